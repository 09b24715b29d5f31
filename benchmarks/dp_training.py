"""Time and memory of a private step beside a plain one, and beside Opacus's hooks.

A private step is what `train_privately` does with one draw of patients: gradients of each record,
clipping, noise, step. For a small CNN (28 x 28 pixels) and eleven MONAI networks in 2D (64 x 64,
batches of 8) and 3D (32 x 32 x 32, batches of 4; SwinUNETR 64 x 64 x 64, 2). BatchNorm is replaced
by GroupNorm and parameters that never get a gradient are frozen, for all alike.

- plain: one gradient of the mean loss, SGD
- here: with the method that `RecordGradients` chooses
- vmap, loop: with the one or the other, whatever was chosen
- hooks: Opacus's `GradSampleModule` and `DPOptimizer`. Without in-place activations and sums, which
  its hooks cannot follow.
- secure: the same with Opacus's secure mode of noise, whose numbers are sums of four
- noise: `add_noise` alone, drawn in the step: one normal a weight on a grid of a 64th of the noise,
  beside half the sum of four on no grid

Milliseconds are medians over the repeats, ratios to a plain step medians of the ratios within a
repeat, in which all take turns. Memory is what a step takes at most on top of model and batch,
measured in a process of its own: resident memory, or on a GPU what torch allocates.

``python benchmarks/dp_training.py [--networks UNet CNN] [--dims 2 3] [--repeats 3] [--no-memory]
[--device cuda --mixed-precision]``
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from monai.networks import nets
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedmed_flower.clients.training import keep_freed_memory, micro_batch_size
from fedmed_flower.privacy.gradients import PROBE, RecordGradients
from fedmed_flower.privacy.optimizer import PatientOptimizer
from fedmed_flower.privacy.validate import with_group_norm

Batch = Mapping[str, Tensor]
Step = Callable[[], Any]
NOISE, NORM, RATE = 1.0, 1.0, 0.01
GRID = NOISE * NORM / 64
LEVELS = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)}
CNN_BATCHES = (64, 128, 256, 512)
LABELS = 2
# A measurement takes about so many seconds: short steps are repeated.
LENGTH = 0.3
VARIANTS = ("plain", "ours", "vmap", "loop", "hooks", "secure")


def cnn(dims: int) -> nn.Module:
    """Return a network of 26,000 weights for 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, LABELS),
    )  # fmt: skip


def resnet18(dims: int) -> nn.Module:
    return nets.resnet18(spatial_dims=dims, n_input_channels=1, num_classes=LABELS)


def dynunet(dims: int) -> nn.Module:
    kernels, strides = [3] * 4, [1, 2, 2, 2]
    return nets.DynUNet(dims, 1, LABELS, kernels, strides, strides[1:], [16, 32, 64, 128])


def efficientnet(dims: int) -> nn.Module:
    name = "efficientnet-b0"
    network = nets.EfficientNetBN(name, False, True, dims, 1, LABELS)
    network.set_swish(memory_efficient=False)
    return network


def unetr(dims: int) -> nn.Module:
    size = (64, 64) if dims == 2 else (32, 32, 32)
    return nets.UNETR(1, LABELS, size, 16, 192, 384, 6, spatial_dims=dims)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "CNN": cnn,
    "UNet": lambda dims: nets.UNet(dims, 1, LABELS, **LEVELS, num_res_units=2, norm="batch"),
    "AttentionUnet": lambda dims: nets.AttentionUnet(dims, 1, LABELS, **LEVELS),
    "BasicUNet": lambda dims: nets.BasicUNet(dims, 1, LABELS, (16, 16, 32, 64, 128, 16)),
    "DynUNet": dynunet,
    "SegResNet": lambda dims: nets.SegResNet(dims, 16, 1, LABELS),
    "ResNet18": resnet18,
    "DenseNet121": lambda dims: nets.DenseNet121(dims, 1, LABELS),
    "EfficientNet-B0": efficientnet,
    "VNet": lambda dims: nets.VNet(dims, 1, LABELS),
    "UNETR": unetr,
    "SwinUNETR": lambda dims: nets.SwinUNETR(1, LABELS, feature_size=24, spatial_dims=dims),
}


class Case(NamedTuple):
    """One row of the table."""

    name: str
    dims: int
    batch: int
    size: int
    device: str
    mixed_precision: bool

    def batch_and_model(self) -> tuple[Batch, nn.Module]:
        """Return random records and the network, on the device."""
        torch.manual_seed(0)
        model = with_group_norm(NETWORKS[self.name](self.dims)).train()
        shape = (self.size,) * self.dims
        images = torch.randn(self.batch, 1, *shape)
        with torch.no_grad():
            outputs = model(images[:1])
        labels = torch.randint(LABELS, (self.batch, *outputs.shape[2:]))
        batch = {"image": images.to(self.device), "label": labels.to(self.device)}
        loss(model, {key: value[:1].cpu() for key, value in batch.items()}).backward()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        model.zero_grad(set_to_none=True)
        return batch, model.to(self.device)


def loss(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Return the mean cross entropy, of images or of pixels."""
    return nn.functional.cross_entropy(model(batch["image"]), batch["label"])


def plain(case: Case, batch: Batch, model: nn.Module) -> tuple[Step, None]:
    """Return a step of plain SGD."""
    optimizer = torch.optim.SGD(trained(model), RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(case):
            value = loss(model, batch)
        value.backward()
        optimizer.step()

    return step, None


def patient_optimizer(case: Case, model: nn.Module, step: float = GRID) -> PatientOptimizer:
    sgd = torch.optim.SGD(trained(model), RATE)
    return PatientOptimizer(sgd, NOISE, NORM, case.batch, step)


def noise_alone(case: Case, model: nn.Module, step: float) -> Step:
    """Return what adds noise to sums of 0."""
    optimizer = patient_optimizer(case, model, step)
    for parameter in optimizer.params:
        parameter.summed_grad = torch.zeros_like(parameter, dtype=torch.float64)
    return optimizer.add_noise


def private(
    case: Case, batch: Batch, model: nn.Module, method: str = "auto"
) -> tuple[Step, RecordGradients]:
    """Return a step as `train_privately` makes it; its first call chooses the method."""
    optimizer = patient_optimizer(case, model)
    gradients = RecordGradients(model, loss, case.mixed_precision, method)
    size = PROBE if method == "loop" else case.batch

    def step() -> None:
        nonlocal size
        if gradients.method == "auto":
            size = micro_batch_size(gradients, batch, case.batch)
        optimizer.draw_ahead()
        for start in range(0, case.batch, size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            optimizer.accumulate(gradients(part)[0])
        optimizer.release()

    return step, gradients


def hooks(case: Case, batch: Batch, model: nn.Module, secure: bool) -> tuple[Step, None]:
    """Return a step of Opacus's own."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    hooked = Hooked(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(trained(hooked), RATE),
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        expected_batch_size=case.batch,
        secure_mode=secure,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with OutOfPlace(), autocast(case):
            value = loss(hooked, batch)
        value.backward()
        optimizer.step()

    return step, None


class Hooked(GradSampleModule):
    """Hooks each layer once, also where it has two names."""

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the layers with parameters of their own."""
        yield from dict.fromkeys(super().iterate_submodules(module))


class OutOfPlace(TorchFunctionMode):
    """Makes ``x += y`` and ``x *= y`` new tensors: hooks fail where a layer's output is changed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or the one in its place."""
        other = {Tensor.__iadd__: torch.add, Tensor.__imul__: torch.mul, Tensor.add_: torch.add}
        return other.get(func, func)(*args, **(kwargs or {}))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def autocast(case: Case) -> Any:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.mixed_precision)


def prepare(case: Case, variant: str) -> tuple[Step, RecordGradients | None]:
    """Return a step of a model of its own, and what knows its method."""
    batch, model = case.batch_and_model()
    if variant == "plain":
        return plain(case, batch, model)
    if variant in ("hooks", "secure"):
        return hooks(case, batch, model, variant == "secure")
    return private(case, batch, model, "auto" if variant == "ours" else variant)


def seconds(step: Step, count: int, device: str) -> float:
    """Return how long a step takes, as the mean of so many."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def memory(case: Case, variant: str, pipe: Any) -> None:
    """Send how many bytes steps take on top of model and batch; in a process of its own."""
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    step, _ = prepare(case, variant)
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    # Linux: the highest value is set back to the present one.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(2):
        step()
    pipe.send(resident("VmHWM") - before)


def resident(key: str) -> int:
    """Return a value of this process's memory, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def megabytes(case: Case, variant: str) -> float:
    """Return the memory of a step; NaN where it could not be measured."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=memory, args=(case, variant, there))
    process.start()
    there.close()
    with contextlib.suppress(EOFError):
        return float(here.recv()) / 2**20
    return float("nan")


def compare(case: Case, args: argparse.Namespace) -> list[str]:
    """Return one row."""
    steps: dict[str, Step] = {}
    methods: dict[str, str] = {}
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    for variant in VARIANTS:
        try:
            step, gradients = prepare(case, variant)
            step()
            methods[variant] = gradients.method if gradients else variant
            counts[variant] = max(1, min(20, int(LENGTH / seconds(step, 1, case.device))))
            steps[variant] = step
        except Exception as error:  # A table of what fails is the purpose.
            failed[variant] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(args.repeats):
        for variant, step in steps.items():
            times[variant].append(seconds(step, counts[variant], case.device))

    def ratio(variant: str) -> str:
        if not {variant, "plain"} <= times.keys():
            return "fails"
        pairs = zip(times[variant], times["plain"], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    del steps
    cells = [case.name, f"{case.dims}D", str(case.batch), methods.get("ours", "fails")]
    cells.append(f"{1000 * statistics.median(times.get('plain', [math.nan])):.1f}")
    cells += [ratio(variant) for variant in VARIANTS if variant != "plain"]
    cells += noise_cells(case, args.repeats)
    for variant in ("plain", "ours", "hooks"):
        wanted = args.memory and variant in times
        cells.append(f"{megabytes(case, variant):.0f}" if wanted else "")
    for variant, reason in failed.items():
        print(f"{case.name}, {variant} fails: {reason[:150]}", file=sys.stderr, flush=True)
    return cells


def noise_cells(case: Case, repeats: int) -> list[str]:
    """Return nanoseconds a weight of the noise, and their ratio to those of four normals, in turns.

    CPU time: of a thread that is drawing alone.
    """
    _, model = case.batch_and_model()
    weights = sum(p.numel() for p in trained(model))
    steps = [noise_alone(case, model, grid) for grid in (GRID, 0.0)]
    # A tenth of a million weights or more in each measurement.
    count = 1 + 100_000 // weights
    times: list[list[float]] = [[], []]
    for number in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            spent = cpu_seconds(step, count, case.device)
            if number:
                found.append(spent)
    new, old = times
    nanoseconds = 1e9 * statistics.median(new) / weights
    ratio = statistics.median(a / b for a, b in zip(new, old, strict=True))
    return [f"{nanoseconds:.0f}", f"{ratio:.2f}"]


def cpu_seconds(step: Step, count: int, device: str) -> float:
    """Return the CPU time of a step, as the mean of so many; on a GPU the time that it took."""
    if device == "cuda":
        return seconds(step, count, device)
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the rows that are asked for."""
    given = (args.device, args.mixed_precision)
    for dims in args.dims:
        for name in args.networks:
            if name == "CNN":
                sizes = [(batch, 28) for batch in CNN_BATCHES if dims == 2]
            elif dims == 2:
                sizes = [(8, 64)]
            else:
                sizes = [(2, 64) if name == "SwinUNETR" else (4, 32)]
            for batch, size in sizes:
                yield Case(name, dims, batch, size, *given)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixed-precision", action="store_true", help="bfloat16 by autocast")
    documented.add_options(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # For all variants alike: it makes each of them faster.
    keep_freed_memory()
    multiprocessing.set_forkserver_preload(["opacus", "monai.networks.nets"])
    began = time.time()
    head = ["network", "dimensions", "batch", "method here", "a plain step, ms"]
    head += ["here / plain", "vmap / plain", "loop / plain", "hooks / plain"]
    head += ["hooks with secure noise / plain", "noise, ns a weight", "noise / four normals"]
    head += ["plain, MB", "here, MB", "hooks, MB"]
    rows = (compare(case, args) for case in cases(args))
    versions = ("torch", "monai", "opacus")
    documented.show("dp_training", head, rows, args, versions=versions)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
