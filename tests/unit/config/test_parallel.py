"""What follows from the settings of a layout."""

from megatron_hypenet.config.parallel import ParallelConfig


def test_a_replica_is_the_product_of_its_axes():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=4
    )
    assert parallel.model_parallel_size == 24


def test_chunks_are_not_processes():
    plain = ParallelConfig(pipeline_model_parallel_size=3)
    chunked = plain.model_copy(update={"virtual_pipeline_model_parallel_size": 2})
    assert (plain.num_chunks, plain.interleaved) == (3, False)
    assert (chunked.num_chunks, chunked.interleaved) == (6, True)
    assert chunked.model_parallel_size == plain.model_parallel_size == 3


def test_lengths_are_split_by_context_and_again_by_sequence_parallelism():
    assert ParallelConfig(tensor_model_parallel_size=4).sequence_unit == 1
    assert ParallelConfig(context_parallel_size=3).sequence_unit == 6
    both = ParallelConfig(
        tensor_model_parallel_size=4, context_parallel_size=3, sequence_parallel=True
    )
    assert both.sequence_unit == 12
