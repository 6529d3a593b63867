"""The fake accelerator. Registering it changes torch for good, so each check runs beside."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import backend_registration

import lowbits
from lowbits.core.device import default_device
from lowbits.testing.accelerator import count_host_copies, fake_accelerator
from lowbits.testing.streams import ThreadedOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)


def raises(call: Callable[[], Any], match: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=match):
        call()


def same(fake: Tensor, host: Tensor) -> bool:
    assert fake.device == fake_accelerator()
    return fake.dtype == host.dtype and torch.equal(fake.cpu(), host)


def it_is_the_accelerator() -> None:
    device = fake_accelerator()
    assert fake_accelerator() == device == torch.device("fakegpu", 0)
    assert torch.accelerator.current_accelerator() == torch.device("fakegpu")
    assert default_device() == torch.device("fakegpu")
    assert type(torch.ones(1, device=device)) is torch.Tensor


def tensors_are_made_on_it() -> None:
    device = fake_accelerator()
    buffer = torch.empty(16, dtype=torch.uint8, device="fakegpu")
    assert (buffer.device, buffer.dtype, buffer.shape) == (device, torch.uint8, (16,))
    makers: list[Callable[[Any], Tensor]] = [
        lambda d: torch.arange(1, 7, 2, device=d),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.eye(3, dtype=torch.float16, device=d),
        lambda d: torch.full((2, 2), 3.0, device=d),
        lambda d: torch.tensor([[1, 2]], device=d),
        lambda d: torch.zeros(3, device=d).new_ones(4),
        lambda d: torch.ones_like(torch.empty(2, 3, device=d)),
        lambda d: torch.randn(4, device=d),
        lambda d: torch.add(torch.ones(2, device=d), 1, out=torch.empty(0, device=d)),
        lambda d: torch.ones(2, device=d).resize_(2, 0),
        lambda d: torch.ones(2, 3, device=d).t_().unsqueeze_(0),
        lambda d: torch.ones(3, dtype=torch.int64, device=d) & -9205322385119247871,
    ]
    for make in makers:
        torch.manual_seed(1)
        expected = make("cpu")
        torch.manual_seed(1)
        assert same(make(device), expected)
    assert repr(torch.arange(2, device=device)) == "tensor([0, 1], device='fakegpu:0')"


def views_share_memory() -> None:
    device = fake_accelerator()
    for mode in MODES:
        buffer = torch.zeros(1024, dtype=torch.uint8, device=device)
        values = torch.randn(8, 8)
        with mode():
            view = buffer[256:512].view(torch.float32).view(8, 8)
            strided = torch.as_strided(buffer.view(torch.float32), (4, 4), (8, 1), 64)
            parameter = nn.Parameter(view, requires_grad=False)
            buffer[256:512].copy_(values.view(torch.uint8).view(-1))
            assert same(parameter, values)
            assert same(strided, values[:4, :4])
            assert same(buffer[256:512], values.view(torch.uint8).view(-1))
            parameter.zero_()
        assert not buffer.cpu().any()
        assert type(parameter) is nn.Parameter
        assert parameter.data_ptr() == buffer.data_ptr() + 256
        assert parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def memory_lives_as_long_as_a_view() -> None:
    gone: list[bool] = []
    buffer = torch.full((64,), 7, dtype=torch.uint8, device=fake_accelerator())
    weakref.finalize(buffer.untyped_storage(), gone.append, True)
    parameter = nn.Parameter(buffer[8:16], requires_grad=False)
    del buffer
    gc.collect()
    assert not gone
    assert same(parameter, torch.full((8,), 7, dtype=torch.uint8))
    del parameter
    assert gone


def mixed_devices_raise() -> None:
    here = torch.arange(9.0, device=fake_accelerator()).view(3, 3)
    there = torch.ones(3, 3)
    calls: list[Callable[[], Any]] = [
        lambda: here + there,
        lambda: here.add_(there),
        lambda: nn.Linear(3, 3)(here),
        lambda: functional.layer_norm(here, (3,), torch.ones(3)),
        lambda: torch.cat([here, there]),
        lambda: torch.equal(here, there),
        lambda: nn.Embedding(3, 3).to(here.device)(torch.tensor([1])),
        lambda: torch.add(here, 1, out=there),
        lambda: functional.scaled_dot_product_attention(here, here, there),
    ]
    for mode in MODES:
        with mode():
            for call in calls:
                raises(call, "same device, .* fakegpu:0 and cpu")
            assert same(here * torch.tensor(2.0), here.cpu() * 2)
            assert same(here[torch.tensor([2, 0])], here.cpu()[torch.tensor([2, 0])])
            written = here.clone().index_put_((torch.tensor([0]),), torch.tensor(5.0))
            assert same(written[0], torch.full((3,), 5.0))
    raises(here.numpy, "can't convert fakegpu:0")


def modules_move_both_ways() -> None:
    device = fake_accelerator()  # before the first backward pass of the process
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x, before = torch.randn(3, 4), [*model.parameters()]
    held = weakref.ref(before[0])
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad for p in before]
    model.to(device)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert held() is model[0].weight
    for tensor, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        assert tensor.grad is not None
        assert tensor.requires_grad
        assert same(tensor.grad, gradient)
    assert all(buffer.device == device for buffer in model.buffers())
    assert same(model(x.to(device)), expected)
    model.cpu()
    assert torch.equal(model(x), expected)
    before[0].data = before[0].data.to(device)
    assert before[0].device == model[0].weight.device == device


def classes_of_tensors_take_what_crosses() -> None:
    device = fake_accelerator()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    with lowbits.LayerStreamer(model, device=device, budget=512, location="cpu"):
        for value in (torch.ones(4, 4), torch.zeros(4, 4, device=device)):
            stand_in = model[0].weight
            stand_in.data = value
            assert model[0].weight is stand_in
            assert torch.equal(model.state_dict()["0.weight"].cpu(), value.cpu())


def gradients_are_the_same() -> None:
    results = []
    for device in (torch.device("cpu"), fake_accelerator()):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        query = model(torch.randn(1, 2, 8, 8).to(device)).flatten(2)
        loss: Any = functional.scaled_dot_product_attention(query, query, query).square().mean()
        loss.backward()
        optimizer.step()
        results.append([p.detach().cpu() for p in model.parameters()])
    for host, fake in zip(*results, strict=True):
        assert torch.allclose(host, fake, atol=1e-5)


def copies_to_the_host_are_counted() -> None:
    x = torch.ones(16, device=fake_accelerator())
    with count_host_copies(over=8) as copies:
        assert bool((x > 0).all())
        assert x.sum().item() == 16
        x.copy_(torch.ones(16))
        x.clone()
        assert copies.nbytes == 0
        x.cpu()
        x.to("cpu", torch.float16)
        torch.empty(16).copy_(x)
        x.tolist()
    x.cpu()
    assert copies.nbytes == 64 + 32 + 64 + 64
    assert copies.largest_bytes == 64


def copies_are_made_and_saved() -> None:
    model = nn.BatchNorm1d(3).to(fake_accelerator())
    x = torch.arange(3.0, device=fake_accelerator())
    file = io.BytesIO()
    torch.save(x, file)
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), load(file), load(file, x.device)):
        assert same(twin, x.cpu())
        twin.zero_()
    assert same(x, torch.arange(3.0))
    assert torch.equal(load(file, "cpu"), x.cpu())
    assert copy.deepcopy(model).weight.device == x.device
    model.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})


def load(file: io.BytesIO, place: Any = None) -> Any:
    file.seek(0)
    return torch.load(file, place)


def inference_tensors_are_as_on_a_device() -> None:
    base = torch.zeros(8, device=fake_accelerator())
    with torch.inference_mode():
        assert not base[2:4].is_inference()
        assert (base + 1).is_inference()
        with torch.inference_mode(mode=False):
            assert not torch.empty(3, device=base.device).is_inference()


def compiled_graphs_run() -> None:
    torch.compiler.reset()
    model, x = nn.Linear(4, 4).to(fake_accelerator()), torch.ones(1, 4, device=fake_accelerator())
    with torch.no_grad(), torch.random.fork_rng(), torch.autocast("fakegpu", torch.bfloat16):
        compiled = torch.compile(model, backend="aot_eager")
        assert same(compiled(x), model(x).cpu())


def layers_compute_what_the_cpu_does() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    layers: list[tuple[Any, Tensor]] = [
        (encoder, torch.randn(1, 3, 8)),
        (nn.Conv2d(4, 8, 3, padding=1), torch.randn(1, 4, 9, 9)),
        (nn.ConvTranspose2d(4, 8, 3), torch.randn(1, 4, 9, 9)),
        (nn.Conv3d(2, 4, 3), torch.randn(1, 2, 5, 5, 5)),
        (nn.PixelShuffle(2), torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)),
        (nn.LayerNorm(64), torch.randn(3, 64)),
        (nn.RMSNorm(64), torch.randn(3, 64)),
        (nn.GroupNorm(4, 16), torch.randn(2, 16, 7, 7)),
        (nn.Linear(64, 64).bfloat16(), torch.randn(3, 64).bfloat16()),
        (nn.Upsample(scale_factor=2), torch.randn(1, 4, 3, 3)),
        (nn.Embedding(5, 6), torch.tensor([[1, 4]])),
    ]
    for layer, x in layers:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                expected = layer.cpu()(x)
                result = layer.to(fake_accelerator())(x.to(fake_accelerator()))
            assert same(result, expected), layer
            assert result.stride() == expected.stride(), layer


def pipelines_draw_what_the_cpu_does(name: str) -> None:
    from pipelines import PIPELINES, draw

    expected = draw(name, PIPELINES[name].build())
    pipe = PIPELINES[name].build().to(fake_accelerator())
    with count_host_copies(over=64) as copies:
        assert torch.equal(draw(name, pipe), expected)
    assert copies.nbytes == expected.nbytes


def packed_models_draw_what_the_cpu_does(scheme: str) -> None:
    from pipelines import PIPELINES, draw

    device = fake_accelerator()
    pipe = PIPELINES["flux"].build()
    unpacked = draw("flux", pipe)
    lowbits.apply(pipe, scheme, device="cpu")
    expected = draw("flux", pipe)
    lowbits.restore(pipe)
    weights = [*pipe.transformer.parameters()]
    lowbits.apply(pipe, scheme)
    assert pipe.transformer.device == device
    assert torch.equal(draw("flux", pipe), expected)
    lowbits.restore(pipe)
    assert [id(p) for p in pipe.transformer.parameters()] == [id(p) for p in weights]
    assert torch.equal(draw("flux", pipe.to("cpu")), unpacked)


def threads_copy_to_it() -> None:
    x, linear = torch.randn(3, 64), nn.Linear(64, 64)
    expected = linear(x)
    masters = [torch.randn(64 * 64) for _ in range(5)] + [linear.weight.detach().view(-1)]
    with ThreadedOps(fake_accelerator(), delay=lambda _: 0.002, poison=True) as ops:
        slot = ops.empty(64 * 64 * 4)
        weight = nn.Parameter(slot.view(torch.float32).view(64, 64), requires_grad=False)
        bias = linear.bias.to(slot.device)
        with count_host_copies() as copies, torch.inference_mode():
            for master in masters:
                ops.copy(slot, master.view(torch.uint8))
            ops.compute_after(ops.mark_copied())
            result = functional.linear(x.to(slot.device), weight, bias)
        assert copies.nbytes == 0
        assert same(result, expected.detach())
        assert ops.allocated_bytes == ops.peak_bytes == slot.nbytes
        del slot, weight
        assert ops.allocated_bytes == 0


def importing_registers_nothing() -> None:
    assert default_device() == torch.device("cpu")
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    # Another package takes torch's only spare backend.
    backend_registration.rename_privateuse1_backend("other")
    raises(fake_accelerator, "has the backend 'other'")


@pytest.mark.parametrize(
    "check",
    [
        it_is_the_accelerator,
        tensors_are_made_on_it,
        views_share_memory,
        memory_lives_as_long_as_a_view,
        mixed_devices_raise,
        modules_move_both_ways,
        classes_of_tensors_take_what_crosses,
        gradients_are_the_same,
        copies_to_the_host_are_counted,
        copies_are_made_and_saved,
        inference_tensors_are_as_on_a_device,
        compiled_graphs_run,
        layers_compute_what_the_cpu_does,
        threads_copy_to_it,
    ],
    ids=lambda check: check.__name__,
)
def test_fake_accelerator(check: Callable[[], None], run_beside: Callable[..., Any]) -> None:
    run_beside(check)


@pytest.mark.parametrize("name", ["flux", "sdxl", "sana"])
def test_pipelines(name: str, run_beside: Callable[..., Any]) -> None:
    run_beside(pipelines_draw_what_the_cpu_does, name)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q8_0", "float8-e4m3fn"])
def test_packed_models(scheme: str, run_beside: Callable[..., Any]) -> None:
    run_beside(packed_models_draw_what_the_cpu_does, scheme)


def test_nothing_is_registered_before_the_call(run_in_fresh_process: Callable[..., Any]) -> None:
    run_in_fresh_process(importing_registers_nothing)
