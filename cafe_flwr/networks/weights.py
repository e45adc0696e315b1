"""Which tensors of a network are weights, and under which names: parameters and running statistics, tied ones once.

Every other buffer (index tables, masks, counters, constants) stays as the network was built with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from torch import Tensor, nn

from cafe_flwr.networks.statistics import batch_norm_names


def tied_names(network: nn.Module) -> dict[str, str]:
    """The first state-dict name of a tensor that has several, by each of the others.

    Tensors are one if they are the same object, or have the same memory and shape.

    Examples
    --------
    >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> layers[1].weight = layers[0].weight
    >>> tied_names(layers)
    {'1.weight': '0.weight'}
    """
    first: dict[Hashable, str] = {}
    found = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        earlier = first.setdefault(_identity(tensor), name)
        if earlier != name:
            found[name] = earlier
    return found


def _identity(tensor: Tensor) -> Hashable:
    if not tensor.numel() or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def tie(network: nn.Module) -> None:
    """Make tied parameters one object, so that they stay tied when they are copied or moved to a device."""
    objects = network.state_dict(keep_vars=True)
    for name, first in tied_names(network).items():
        prefix, _, own = name.rpartition(".")
        if isinstance(objects[first], nn.Parameter):
            network.get_submodule(prefix)._parameters[own] = objects[first]


def weight_names(network: nn.Module) -> list[str]:
    """State-dict names of floating parameters and running statistics; of tied ones the first.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(3)
    >>> norm.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
    >>> weight_names(norm)
    ['weight', 'bias', 'running_mean', 'running_var']
    """
    statistics, tied = set(batch_norm_names(network)), tied_names(network)
    return [
        name
        for name, tensor in network.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or name in statistics) and name not in tied
    ]


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of :func:`weight_names`, not copied."""
    tensors = network.state_dict()
    return {name: tensors[name] for name in weight_names(network)}


def kept_names(network: nn.Module) -> list[str]:
    """:func:`weight_names` and the counters of norms, which a client with a network of its own keeps, too."""
    kept = {*weight_names(network), *batch_norm_names(network)} - tied_names(network).keys()
    return [name for name in network.state_dict() if name in kept]


def once(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Names without those of constant buffers, and of tied tensors the first one; names of other tensors stay.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(3)
    >>> norm.register_buffer("table", norm.running_mean.long())
    >>> once(norm, ["table", "weight", "update.table"])
    ['weight', 'update.table']
    """
    tied, kept = tied_names(network), {*kept_names(network)}
    constants = {name for name in network.state_dict() if tied.get(name, name) not in kept}
    found: dict[str, str] = {}
    for name in names:
        if name not in constants:
            found.setdefault(tied.get(name, name), name)
    return list(found.values())


def names_of_each(network: nn.Module) -> dict[str, list[str]]:
    """All names of the tensor, by each of its state-dict names."""
    tied, groups = tied_names(network), dict[str, list[str]]()
    for name in network.state_dict():
        groups.setdefault(tied.get(name, name), []).append(name)
    return {name: group for group in groups.values() for name in group}


def leading(wide: Mapping[str, Tensor], narrow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a narrower network takes of a network's tensors: first rows, columns, …; tables of another shape it has."""
    return {
        name: wide[name][tuple(map(slice, own.shape))]
        for name, own in narrow.items()
        if own.is_floating_point() or own.shape == wide[name].shape
    }
