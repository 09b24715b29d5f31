"""A network as a list of torch's operations: plain data, which needs and holds no code.

`torch.export.load` unpickles what it reads and evaluates texts, so that a file of a stranger can
run anything; TorchScript can open files. Here a graph is JSON. Whoever reads it looks each
operation up in a list of those that only compute (`_OPERATIONS`), and each argument is a number, a
text, a list of those, or the name of an earlier result. Weights are not part of it.

The operations are those that the network itself calls in evaluation mode, in the same order and
with the same arguments, so the results are the same to the bit.
"""

from __future__ import annotations

import ast
import logging
import math
import operator
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmed_flower.errors import InputError

log = logging.getLogger("flwr.fedmed")

# Of torch.ops.aten. Each computes from its arguments alone: none reads a file, sets memory of
# another tensor, or draws at random once a network is in evaluation mode.
_OPERATIONS = frozenset(
    """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
    linear addmm mm bmm matmul baddbmm einsum scaled_dot_product_attention embedding
    batch_norm layer_norm group_norm instance_norm rms_norm native_layer_norm native_group_norm
    _native_batch_norm_legit_no_training
    relu relu_ relu6 relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_
    mish mish_ sigmoid sigmoid_ tanh tanh_ softplus prelu hardtanh hardtanh_ hardswish hardswish_
    hardsigmoid hardsigmoid_ softmax log_softmax _softmax _log_softmax glu
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    dropout dropout_ feature_dropout feature_dropout_ alpha_dropout
    cat concat stack split split_with_sizes chunk tensor_split unbind unsafe_split unsafe_chunk
    view view_as reshape _unsafe_view flatten unflatten permute transpose t movedim swapaxes
    squeeze unsqueeze expand expand_as repeat repeat_interleave tile contiguous clone alias detach
    slice select narrow index_select index gather take_along_dim roll flip pad constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    pixel_shuffle pixel_unshuffle unfold im2col
    add add_ sub sub_ rsub mul mul_ div div_ neg abs pow square sqrt rsqrt exp expm1 log log1p erf
    sin cos floor ceil round sign reciprocal remainder floor_divide clamp clamp_ clamp_min clamp_max
    minimum maximum where masked_fill lerp
    mean sum prod amax amin max min var std var_mean logsumexp cumsum argmax argmin norm
    linalg_vector_norm softmin any all
    eq ne lt le gt ge logical_and logical_or logical_not isnan isinf
    to type_as _to_copy float zeros ones full arange linspace zeros_like ones_like full_like
    fill_ copy_ zero_ masked_fill_ new_zeros new_ones new_full scalar_tensor triu tril
    sym_size sym_numel lift_fresh_copy
    """.split()  # noqa: SIM905
)
# Operations that only check, and of which no other result depends.
_CHECKS = frozenset({"_assert_tensor_metadata"})
# Arithmetic of sizes.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem")
}
# What a condition on sizes consists of, besides.
_COMPARED: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_COMPARED |= {
    "max": lambda *parts: max(parts),
    "min": lambda *parts: min(parts),
    "and": lambda *parts: all(parts),
    "or": lambda *parts: any(parts),
    "not": operator.not_,
}
_SYNTAX: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.And: "and",
    ast.Or: "or",
    ast.USub: "neg",
    ast.Not: "not",
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}
_FORMATS = {
    str(form).removeprefix("torch."): form
    for form in (
        *(torch.contiguous_format, torch.preserve_format),
        *(torch.channels_last, torch.channels_last_3d),
    )
}
_MOST_STEPS = 100_000
_MOST_GUARDS = 10_000
_MOST_DEPTH = 50
# By how much another size is larger, on which a graph is tried: networks halve it several times.
_MORE = 16
_SEED = 1


class UnsavableError(Exception):
    """A network that cannot be saved as a graph; the text says why."""


class GraphNetwork(nn.Module):
    """The network of a graph.

    Parameters
    ----------
    content : dict
        As `graph_of` returns it; it may come from a stranger.
    state : dict of str to Tensor
        The state dict of the network.
    constants : dict of str to Tensor
        As `graph_of` returns them.

    Raises
    ------
    InputError
        If the content is not that of a graph, names an operation that is not in the list, or a
        weight that is not in `state`.
    """

    def __init__(
        self, content: Any, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        try:
            self._sizes = _input_sizes(content["sizes"])
            self._guards = [_guard(tree) for tree in _listed(content["guards"], _MOST_GUARDS)]
            steps = _listed(content["steps"], _MOST_STEPS)
            self._input = str(content["input"])
            self._entries: list[tuple[str, str]] = []
            known = {self._input}
            for number, (name, source, key) in enumerate(_listed(content["entries"], _MOST_STEPS)):
                value = {"state": state, "constants": constants}[source][key]
                # Names of weights have dots, which a module's attributes must not have.
                self.register_buffer(f"entry{number}", value)
                self._entries.append((str(name), f"entry{number}"))
                known.add(str(name))
            fixed = known - {self._input}
            self._steps = []
            for name, operation, args, kwargs in steps:
                call = _operation(operation)
                first: Any = args[0] if args else None
                if _changes(operation) and not (_is_name(first) and first["of"] not in fixed):
                    raise ValueError(f"{operation} would change a weight")
                given = {str(key): _known(value, known) for key, value in kwargs.items()}
                self._steps.append((str(name), call, _known(args, known), given))
                known.add(str(name))
            self._output = _known(content["output"], known)
        except InputError:
            raise
        except (KeyError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"this is not the graph of a network: {reason}") from error

    def forward(self, images: Tensor) -> Any:
        """Return what the network returned for such a batch.

        Raises
        ------
        InputError
            If the network was saved for batches of other sizes.
        """
        self._require_sizes(images)
        values: dict[str, Any] = {name: getattr(self, entry) for name, entry in self._entries}
        values[self._input] = images
        for name, call, args, kwargs in self._steps:
            given = {key: _value(value, values, images) for key, value in kwargs.items()}
            values[name] = call(*(_value(value, values, images) for value in args), **given)
        return _value(self._output, values, images)

    def _require_sizes(self, images: Tensor) -> None:
        sizes = tuple(images.shape)
        fits = len(sizes) == len(self._sizes) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(sizes, self._sizes, strict=True)
        )
        if not fits or not all(_holds(guard, sizes) for guard in self._guards):
            raise InputError(
                f"the network was saved for batches of the shape {self.wanted}, got "
                f"{tuple(map(int, sizes))}: give images of such a shape, or the app's own network "
                "(--app)"
            )

    @property
    def wanted(self) -> str:
        """The shape of a batch, as a text: (any, 1, 28, 28)."""
        sides = ["any" if high is None else str(high) for _, high in self._sizes]
        return f"({', '.join(sides)})"


def graph_of(
    network: nn.Module, example: Tensor, free: Collection[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the graph of a network in evaluation mode, and the tensors that are no weights of it.

    Torch's generators are left as they were.

    Parameters
    ----------
    network : Module
        It is put into evaluation mode.
    example : Tensor
        A batch of two or more, of sizes that are not 1 where they are free.
    free : collection of int
        The dimensions of a batch whose size may differ: 0, and those of its sides if they may.

    Returns
    -------
    content : dict
        Plain data that JSON holds: for each dimension the least and the greatest size (``sizes``,
        None for any), conditions on sizes (``guards``), weights by name (``entries``), calls
        (``steps``) and ``output``.
    constants : dict of str to Tensor

    Raises
    ------
    UnsavableError
        If torch cannot trace the network, it calls an operation that is not in the list, or the
        graph gives another result than the network for batches of one and three.
    """
    network.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = {name: value.clone() for name, value in network.state_dict().items()}
        program = _traced(network, example, free)
        content, constants = _content(program, example, free)
        try:
            graph = GraphNetwork(content, network.state_dict(), constants)
        except InputError as error:
            raise UnsavableError(str(error)) from error
        _compare(network, graph, example, free)
        after = network.state_dict()
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        raise UnsavableError(f"it changes its own {changed[0]} in evaluation mode")
    return content, constants


def _traced(network: nn.Module, example: Tensor, free: Collection[int]) -> Any:
    dims = dict.fromkeys(free, torch.export.Dim.AUTO)
    try:
        return torch.export.export(network, (example,), dynamic_shapes=(dims,), strict=False)
    except Exception as error:  # Whatever the network raises, and torch's own errors.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UnsavableError(f"torch cannot trace it: {reason}") from error


def _content(
    program: Any, example: Tensor, free: Collection[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    entries = []
    constants: dict[str, Tensor] = {}
    steps = []
    images = ""
    sizes: list[tuple[int, int | None]] = []
    output: Any = None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                images = node.name
                sizes = _sizes_of(node.meta["val"].shape, program, free)
            elif kind in ("PARAMETER", "BUFFER") and spec.persistent is not False:
                entries.append((node.name, "state", spec.target))
            elif kind in ("BUFFER", "CONSTANT_TENSOR"):
                constants[spec.target] = program.constants[spec.target].detach().clone()
                entries.append((node.name, "constants", spec.target))
            else:
                raise UnsavableError(f"it has an input that is no tensor ({kind})")
        elif node.op == "output":
            outputs = node.args[0]
            # A network that returns one tensor has a tuple of one in its graph.
            single = program.call_spec.out_spec.is_leaf()
            output = _plain(outputs[0] if single else list(outputs))
        elif node.op == "call_function":
            name = _name_of(node.target)
            if name.split(".")[1] not in _CHECKS:
                given = {key: _plain(value) for key, value in node.kwargs.items()}
                steps.append((node.name, name, _plain(node.args), given))
        else:
            raise UnsavableError(f"its graph has a step of the kind {node.op}")
    guards = _guards_of(program) if len(free) > 1 else []
    if any(low == high for dim, (low, high) in enumerate(sizes) if dim == 0):
        raise UnsavableError("its graph fixes the number of images in a batch")
    content = {"sizes": sizes, "guards": guards, "entries": entries, "steps": steps}
    return content | {"input": images, "output": output}, constants


def _sizes_of(
    shape: Sequence[Any], program: Any, free: Collection[int]
) -> list[tuple[int, int | None]]:
    """Return the least and the greatest size of each dimension."""
    sizes: list[tuple[int, int | None]] = []
    for dim, size in enumerate(shape):
        whole = size if isinstance(size, int) else size.node.maybe_as_int()
        if whole is not None:
            sizes.append((whole, whole))
            continue
        bounds = program.range_constraints[size.node.expr]
        upper = bounds.upper
        highest = int(upper) if upper.is_Integer and upper < 2**31 else None
        # Torch takes a free size for 2 or more. That one record gives the same is tried.
        sizes.append((1 if dim == 0 else max(1, int(bounds.lower)), highest))
    return sizes


def _guards_of(program: Any) -> list[Any]:
    """Return the conditions under which another size takes the same path through the network."""
    texts = getattr(program, "_guards_code", None)
    if texts is None:
        raise UnsavableError("this version of torch does not tell for which sizes a graph holds")
    trees = []
    for text in dict.fromkeys(texts):
        # Of the number of records in a batch: what it decides is tried.
        tree = _tree(ast.parse(text, mode="eval").body)
        if tree not in trees and not _names_batch(tree):
            trees.append(tree)
    return trees


def _names_batch(tree: Any) -> bool:
    if isinstance(tree, list):
        return tree == ["size", 0] or any(map(_names_batch, tree))
    return False


def _tree(node: ast.AST) -> Any:
    """Return a condition on sizes as lists: ["eq", ["mod", ["size", 2], 16], 0]."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=kind, operand=operand) if type(kind) in _SYNTAX:
            return [_SYNTAX[type(kind)], _tree(operand)]
        case ast.BoolOp(op=kind, values=parts) if type(kind) in _SYNTAX:
            return [_SYNTAX[type(kind)], *map(_tree, parts)]
        case ast.Call(func=ast.Name(id=("max" | "min") as name), args=parts, keywords=[]):
            return [name, *map(_tree, parts)]
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _SYNTAX:
            return [_SYNTAX[type(kind)], _tree(left), _tree(right)]
        case ast.Compare(left=left, ops=[kind], comparators=[right]) if type(kind) in _SYNTAX:
            return [_SYNTAX[type(kind)], _tree(left), _tree(right)]
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(attr="size")), slice=ast.Constant(value=int(dim))
        ):
            return ["size", dim]
    raise UnsavableError(f"it depends on the size of images by {ast.unparse(node)[:200]!r}")


def _guard(tree: Any, depth: int = 0) -> Any:
    """Check a condition of a file; return it."""
    if depth > _MOST_DEPTH:
        raise ValueError("a guard is nested too deeply")
    if type(tree) is int:
        return tree
    name, *parts = tree
    if name == "size" and len(parts) == 1 and type(parts[0]) is int:
        return ["size", parts[0]]
    if name not in (*_ARITHMETIC, *_COMPARED) or name == "getitem":
        raise ValueError(f"a guard has the operator {name!r}")
    return [name, *(_guard(part, depth + 1) for part in parts)]


def _holds(tree: Any, sizes: Sequence[int]) -> Any:
    """Return the value of a condition, or of a part of one, for the sizes of a batch."""
    if not isinstance(tree, list):
        return tree
    name, *parts = tree
    if name == "size":
        return sizes[parts[0]]
    operation = _ARITHMETIC.get(name) or _COMPARED[name]
    return operation(*(_holds(part, sizes) for part in parts))


def _compare(
    network: nn.Module, graph: GraphNetwork, example: Tensor, free: Collection[int]
) -> None:
    """Raise `UnsavableError` if the graph does not give the same bits as the network."""
    generator = torch.Generator().manual_seed(_SEED)
    sides = list(example.shape[1:])
    shapes = [[count, *sides] for count in (1, 3)]
    spatial = [dim for dim in free if dim]
    if spatial:
        shapes.append([1, *sides])
        for dim in spatial:
            shapes[-1][dim] += _MORE
    for shape in shapes:
        batch = torch.rand(shape, generator=generator).to(example.dtype)
        try:
            results = _flat(graph(batch.clone()))
        except Exception as error:
            raise UnsavableError(
                f"its graph fails for a batch of shape {shape}: {error}"
            ) from error
        wanted = _flat(network(batch.clone()))
        pairs = zip(results, wanted, strict=True)
        if not all(torch.equal(result, value) for result, value in pairs):
            raise UnsavableError(
                f"its graph gives other outputs than the network for a batch of shape {shape}"
            )


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, list | tuple):
        return [tensor for part in outputs for tensor in _flat(part)]
    raise UnsavableError(f"it returns a {type(outputs).__name__}, not tensors")


def _name_of(target: Any) -> str:
    """Return the name of an operation: ``aten.conv2d.default``, or ``size.add`` for sizes."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        packet = target._schema.name.partition("::")[2]
        if packet in _OPERATIONS | _CHECKS:
            return f"aten.{packet}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if _ARITHMETIC.get(name) is target:
        return f"size.{name}"
    raise UnsavableError(f"it calls {target}, which a graph cannot hold")


def _operation(name: str) -> Callable[..., Any]:
    room, packet, *overload = name.split(".")
    if room == "size" and not overload:
        return _ARITHMETIC[packet]
    if room != "aten" or packet not in _OPERATIONS or len(overload) != 1:
        raise ValueError(f"{name!r} is no operation of a network")
    call: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload[0])
    return call


def _changes(operation: str) -> bool:
    """Return whether an operation changes its first argument."""
    packet = operation.split(".")[1]
    return packet.endswith("_")


def _plain(value: Any) -> Any:
    """Return an argument of a call as plain data."""
    if isinstance(value, torch.fx.Node):
        return {"of": value.name}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.device):
        return {"device": "that of the images"}
    for kind, known in (("dtype", _DTYPES), ("format", _FORMATS)):
        for name, member in known.items():
            if member is value:
                return {kind: name}
    if value is torch.strided:
        return {"layout": "strided"}
    raise UnsavableError(f"it calls an operation with {str(value)[:100]}, which is no plain value")


def _is_name(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"of"}


def _known(value: Any, known: Collection[str], depth: int = 0) -> Any:
    """Check an argument of a file, which may name earlier results only; return it."""
    if depth > _MOST_DEPTH:
        raise ValueError("an argument is nested too deeply")
    if isinstance(value, list):
        return [_known(part, known, depth + 1) for part in value]
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        return _checked(str(kind), name, known)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} is no argument")


def _checked(kind: str, name: Any, known: Collection[str]) -> Any:
    if kind == "of":
        if name not in known:
            raise ValueError(f"{name!r} is no earlier result")
        return _Earlier(str(name))
    if kind == "float":
        return float(name)
    if kind == "device":
        return _Device()
    if kind == "layout" and name == "strided":
        return torch.strided
    known_names: dict[str, Mapping[str, Any]] = {"dtype": _DTYPES, "format": _FORMATS}
    return known_names[kind][name]


class _Earlier(str):
    """The name of an earlier result."""


class _Device:
    """Stands for the device of the images."""


def _value(value: Any, values: Mapping[str, Any], images: Tensor) -> Any:
    if isinstance(value, _Earlier):
        return values[value]
    if isinstance(value, _Device):
        return images.device
    if isinstance(value, list):
        return [_value(part, values, images) for part in value]
    return value


def _listed(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) > most:
        raise ValueError(f"a list of at most {most:,} is needed")
    return list(value)


def _input_sizes(value: Any) -> list[tuple[int, int | None]]:
    sizes = []
    for low, high in _listed(value, 8):
        if type(low) is not int or not (high is None or type(high) is int):
            raise ValueError(f"{low!r} to {high!r} are no sizes")
        sizes.append((low, high))
    return sizes
