"""What the forward pass of a model leaves in memory for its backward."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_held(model, *args):
    """Return the result of the model's hidden states, and the memory that its forward pass left
    allocated: unique storages made in it."""
    made = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in tree_leaves(result):
                if (
                    isinstance(x, torch.Tensor)
                    and (storage := x.untyped_storage())._cdata not in own
                ):
                    made.setdefault(storage._cdata, StorageWeakRef(storage))
            return result

    with Watch():
        hidden = model.hidden(*args)
    alive = [
        torch.UntypedStorage._new_with_weak_ptr(found.cdata)
        for found in made.values()
        if not found.expired()
    ]
    return hidden, sum(storage.nbytes() for storage in alive)
