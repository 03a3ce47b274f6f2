"""The variance offset of an approximate site: state that is set, refused, saved, loaded, cast and averaged."""

from typing import Callable

import pytest
import torch
from torch import nn

import bhyt
from support.checks import same_bits
from test_modules import D, ready, run


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("wrap", (lambda site: site, nn.Sequential))
def test_loading_never_leaves_an_old_offset(wrap: Callable[[nn.Module], nn.Module], assign: bool) -> None:
    """The saved offset is in force; that of a site that was unset, or none (the authors' files, an exact site's),
    leaves the site unset, and strict loading accepts it."""
    x = torch.randn(3, D)
    saved = ready(bhyt.BHyTApprox)
    saved.set_variance_offset(0.75)
    site = ready(bhyt.BHyTApprox)
    wrap(site).load_state_dict(wrap(saved).state_dict(), assign=assign)
    assert site.variance_offset.item() == 0.75 and same_bits(run(site, x), run(saved, x))
    for without in (bhyt.BHyT(D), bhyt.BHyTApprox(D)):
        site = ready(bhyt.BHyTApprox)
        result = wrap(site).load_state_dict(wrap(without).state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        with pytest.raises(RuntimeError, match="offset has not been set"):
            run(site, x)
        assert site.variance_offset.isnan()


def test_loading_tensor_by_tensor() -> None:
    """As transformers 4 does: each tensor in a state dict of its own, the offset not last."""
    saved, site = ready(bhyt.BHyTApprox, lam=2.0), bhyt.BHyTApprox(D, device="meta")
    for name in ("variance_offset", "weight", "lam"):
        site.load_state_dict({name: saved.state_dict()[name]}, strict=False, assign=True)
    x = torch.randn(3, D)
    assert same_bits(run(site, x), run(saved, x))


def test_offset_written_from_outside() -> None:
    """Loaders that write buffers without load_state_dict (accelerate, transformers), also in another dtype."""
    site = bhyt.BHyTApprox(D)
    site._buffers["variance_offset"] = torch.tensor(0.25, dtype=torch.bfloat16)
    expected = ready(bhyt.BHyTApprox, elementwise_affine=False)
    assert same_bits(run(site, torch.ones(3, D)), run(expected, torch.ones(3, D)))
    assert site.variance_offset.dtype == torch.float32


def test_averaged_model() -> None:
    """torch.optim.swa_utils: a copy's offset follows, whichever way it keeps buffers."""
    for use_buffers in (False, True):
        site = ready(bhyt.BHyTApprox)
        average = torch.optim.swa_utils.AveragedModel(site, use_buffers=use_buffers)
        for offset in (0.5, 1.0):
            site.set_variance_offset(offset)
            average.update_parameters(site)
        assert average.module.variance_offset.item() == (0.75 if use_buffers else 1.0)


def test_meta_after_the_offset_was_set() -> None:
    """An offset set while on meta has no value: after to_empty, and reset_parameters, the site refuses to run rather
    than to use undefined memory; a loaded state dict brings one, assigned or copied. USERS row 27."""
    def empty() -> bhyt.BHyTApprox:
        site = bhyt.BHyTApprox(D, device="meta")
        site.set_variance_offset(0.25)
        return site

    x, saved = torch.randn(3, D), ready(bhyt.BHyTApprox)
    for site in (empty().to_empty(device="cpu"), empty().to_empty(device="cpu")):
        site.weight.data.fill_(1.0)
        with pytest.raises(RuntimeError, match="offset"):
            run(site, x)
        site.reset_parameters()
    loaded = empty(), empty().to_empty(device="cpu")
    loaded[0].load_state_dict(saved.state_dict(), assign=True)
    loaded[1].load_state_dict(saved.state_dict())
    for site in loaded:
        assert same_bits(run(site, x), run(saved, x))


def test_offset_set_under_inference_mode_then_training() -> None:
    """The offset refreshed while inferring is a plain buffer when training. USERS row 27."""
    site = bhyt.BHyTApprox(D)
    with torch.inference_mode():
        site.set_variance_offset(torch.tensor(0.25))
    run(site, torch.randn(3, D, requires_grad=True)).sum().backward()
    assert site.lam.grad is not None
    site.set_variance_offset(0.5)
    assert site.variance_offset.item() == 0.5


def test_approximate_site_refuses_before_its_offset() -> None:
    """Every way of running it raises, with the two methods that help."""
    site = bhyt.BHyTApprox(D)
    x, v = torch.randn(3, D), torch.ones(3, 1)
    for call in (lambda: site(x, v), lambda: site.forward_add(x, x, v)):
        with pytest.raises(RuntimeError, match="update_variance_offset.*set_variance_offset"):
            call()
    site.set_variance_offset(0.0)
    assert site(x, v).shape == x.shape


def test_variance_offset() -> None:
    """update_variance_offset gives c lam1^2 / kappa1^2 of the exact site, detached, in the buffer's place."""
    first, second = bhyt.BHyT(D, lam=3.0, kappa=5.0), bhyt.BHyTApprox(D, lam=1.0, kappa=10.0)
    buffer = second.variance_offset
    second.update_variance_offset(torch.tensor(2.0), first)
    assert second.variance_offset is buffer and not buffer.requires_grad
    assert buffer.item() == pytest.approx(2.0 * 9 / 25, rel=1e-6)
    with pytest.raises(ValueError, match="one element.*2"):
        second.set_variance_offset(torch.zeros(2))
    for wrong in (-1.0, float("nan"), torch.tensor(-0.5)):
        with pytest.raises(ValueError, match="offset: expected a number >= 0"):
            second.set_variance_offset(wrong)
    with pytest.raises(TypeError, match="first: expected the block's exact site.*BHyTApprox"):
        second.update_variance_offset(torch.tensor(2.0), second)
    assert buffer.item() == pytest.approx(2.0 * 9 / 25, rel=1e-6)


def test_casting_a_model_keeps_the_offset() -> None:
    """.to(bfloat16), .half() and .double() leave the offset the float32 it is."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        site = ready(bhyt.BHyTApprox)
        site.set_variance_offset(1e-9)
        site.to(dtype)
        assert site.weight.dtype == dtype and same_bits(site.variance_offset, torch.tensor([1e-9]))
        x = torch.randn(3, D, dtype=dtype)
        v = (
            x.double()
            .square()
            .mean(-1, keepdim=True)
            .to(torch.float64 if dtype == torch.float64 else torch.float32)
        )
        assert site(x, v).dtype == dtype


def test_to_empty_leaves_no_number_in_an_offset() -> None:
    """Undefined memory is no offset: an unset one stays unset, a set one keeps its number."""
    site = bhyt.BHyTApprox(D).to_empty(device="cpu")
    assert site.variance_offset.isnan() and not site.has_variance_offset()
    site = ready(bhyt.BHyTApprox)
    offset = site.variance_offset.clone()
    assert same_bits(site.to_empty(device="cpu").variance_offset, offset)
