import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups


def test_one_process_needs_no_launcher_and_may_start_twice():
    groups.init_parallel(ParallelConfig(), seed=5)
    groups.init_parallel(ParallelConfig(), seed=5)
    assert groups.is_initialized()
    assert (groups.rank(), groups.world_size()) == (0, 1)
    assert (groups.data_rank(), groups.data_size(), groups.pipeline_stage()) == (0, 1, (0, 1))
    assert groups.all_reduce_mean(torch.tensor(3.0)).item() == 3.0
    groups.barrier()


def test_deepspeed_sees_data_and_model_parallel_groups():
    groups.init_parallel(ParallelConfig())
    unit = groups.ModelParallelUnit()
    assert unit.get_data_parallel_world_size() == unit.get_model_parallel_world_size() == 1
    assert unit.get_data_parallel_rank() == unit.get_model_parallel_rank() == 0
    assert unit.get_data_parallel_group_ranks() == [0]
    assert (
        unit.get_tensor_model_parallel_world_size()
        == unit.get_pipeline_model_parallel_world_size()
        == 1
    )
    # DeepSpeed ignores the model-parallel group of an mpu that has this method
    assert not hasattr(unit, "initialize_sequence_parallel")
