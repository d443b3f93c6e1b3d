"""Augmentation of images: what each does, against plain references, and that a strength concerns its image alone."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers import (
    Affine,
    Brightness,
    Contrast,
    Crop,
    Cutout,
    Flip,
    Hue,
    Saturation,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = ((0.0,), (1.0,))

STRONG = {
    "Affine": (Affine("rotation", "translation", "scale", "shear"), (20.0, 0.2, 0.3, 15.0)),
    "Affine, rotation": (Affine(rotation="angle"), (30.0,)),
    "Crop": (Crop(), (3.0,)),
    "Flip": (Flip(), (1.0,)),
    "Cutout": (Cutout(), (4.0, 2.0)),
    "Brightness": (Brightness(MEAN, STD), (0.4,)),
    "Contrast": (Contrast(MEAN, STD), (0.4,)),
    "Saturation": (Saturation(MEAN, STD), (0.4,)),
    "Hue": (Hue(MEAN, STD), (0.3,)),
}
"""Augmentations, with a strength for each of their hyperparameters."""

every = pytest.mark.parametrize("kind", STRONG)


def normalised(n=6, height=8, width=10, dtype=torch.float32, seed=0):
    """Random pixels, [n, 3, height, width], normalised."""
    pixels = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, std = (torch.tensor(by_channel, dtype=torch.float64)[:, None, None] for by_channel in (MEAN, STD))
    return ((pixels - mean) / std).to(dtype)


def apply(regulariser, x, *strengths, seed=0, draw=None):
    """The images that come of `x`, with values for the hyperparameters in their order: numbers, lists or tensors.

    Uniform draws are all `draw` if it is given.
    """
    torch.manual_seed(seed)
    values = dict(zip(regulariser.hyperparameters, map(torch.as_tensor, strengths), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        if draw is not None:
            patch.setattr(torch, "rand", lambda *size, **options: torch.full(size, draw, **options))
        images, target = regulariser.transform((x, "target"), values)
    assert target == "target"
    return images


def strong(kind, share=1.0):
    """An augmentation, and its strengths times a number or a tensor."""
    regulariser, strengths = STRONG[kind]
    return regulariser, [share * strength for strength in strengths]


# --- what holds for every one


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_example", [False, True])
def test_neutral_strengths_leave_every_bit(kind, dtype, by_example):
    x = normalised(dtype=dtype)
    regulariser = STRONG[kind][0]
    neutral = [strength.neutral for strength in regulariser.hyperparameters.values()]
    y = apply(regulariser, x, *([value] * len(x) if by_example else value for value in neutral))
    assert y.dtype == dtype
    assert torch.equal(y, x)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_changes_images_keeping_type_shape_and_its_input(kind, dtype):
    x = normalised(dtype=dtype)
    before = x.clone()
    regulariser, strengths = strong(kind)
    y = apply(regulariser, x, *strengths)
    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device)
    assert y.isfinite().all()
    assert torch.equal(x, before)
    assert not torch.equal(y, x)


@every
def test_one_value_is_the_same_as_it_for_every_example(kind):
    x = normalised()
    regulariser, strengths = strong(kind)
    by_example = [[strength] * len(x) for strength in strengths]
    assert torch.equal(apply(regulariser, x, *strengths), apply(regulariser, x, *by_example))


@every
def test_strengths_of_other_examples_do_not_matter(kind):
    x = normalised()
    regulariser, everywhere = strong(kind)
    together = apply(regulariser, x, *everywhere)
    for i in range(len(x)):
        _, alone = strong(kind, F.one_hot(torch.tensor(i), len(x)).float())
        y = apply(regulariser, x, *alone)
        assert torch.equal(y[i], together[i])
        others = torch.arange(len(x)) != i
        assert torch.equal(y[others], x[others])


@every
def test_draws_as_many_numbers_whatever_the_strengths(kind):
    states = []
    for share in (0.0, 0.5, 1.0):
        regulariser, strengths = strong(kind, share)
        apply(regulariser, normalised(), *strengths)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@every
def test_seed_decides(kind):
    x = normalised(n=32)
    regulariser, strengths = strong(kind, 0.5)
    first, again, other = (apply(regulariser, x, *strengths, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every
def test_gradient_of_images(kind):
    # away from grey and from the range's ends, where colours have kinks
    x = normalised(n=2, height=3, width=4, dtype=torch.float64).requires_grad_()
    regulariser, strengths = strong(kind, 0.5)
    assert torch.autograd.gradcheck(lambda x: apply(regulariser, x, *strengths), (x,))


@every
def test_inside_transforms_of_functions_of_other_things(kind):
    x = normalised()
    regulariser, strengths = strong(kind)
    expected = apply(regulariser, x, *strengths).square().sum()

    def loss(weight, *strengths):
        return weight * apply(regulariser, x, *strengths).square().sum()

    primals = (torch.tensor(2.0), *map(torch.tensor, strengths))
    value, tangent = torch.func.jvp(loss, primals, tuple(map(torch.ones_like, primals)))
    assert torch.allclose(value, 2 * expected)
    assert torch.allclose(tangent, expected)
    gradients = torch.func.grad(loss, argnums=tuple(range(len(primals))))(*primals)
    assert torch.allclose(gradients[0], expected)
    assert not any(gradients[1:])


@every
def test_rejects_what_is_no_batch_of_images(kind):
    regulariser, strengths = strong(kind)
    name = type(regulariser).__name__
    for x, said in (
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 4, 4), r"\[2, 4, 4\]"),
        ([1.0], "list"),
    ):
        with pytest.raises(InputError, match=f"^{name} needs floating images of shape .*{said}") as error:
            apply(regulariser, x, *strengths)
        assert "\n" not in str(error.value)


@every
def test_empty_batches(kind):
    regulariser, strengths = strong(kind)
    assert apply(regulariser, normalised()[:0], *strengths).shape == (0, 3, 8, 10)


# --- cutout


def hole(height, width, row, column, length):
    """Where a hole about a centre is: the plain way."""
    covered = torch.zeros(height, width, dtype=torch.bool)
    top, left = row - length // 2, column - length // 2
    covered[max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = True
    return covered


def possible_holes(height, width, length):
    return {
        tuple(hole(height, width, row, column, length).flatten().tolist())
        for row in range(height)
        for column in range(width)
    }


@pytest.mark.parametrize("length", [1, 2, 3, 6, 20])
def test_cutout_makes_each_possible_hole_and_no_other(length):
    y = apply(Cutout(), torch.ones(2000, 2, 4, 5), float(length), 1.0)
    assert torch.equal(y[:, 0], y[:, 1])
    assert {tuple(mask) for mask in (y[:, 0] == 0).flatten(1).tolist()} == possible_holes(4, 5, length)


def test_cutout_makes_as_many_holes_as_told():
    masks = [torch.tensor(mask) for mask in possible_holes(4, 4, 2)]
    unions = {tuple((a | b).tolist()) for a, b in itertools.product(masks, masks)}
    y = apply(Cutout(), torch.ones(5000, 1, 4, 4), 2.2, 1.8)
    assert {tuple(mask) for mask in (y[:, 0] == 0).flatten(1).tolist()} == unions


def test_cutout_holes_and_sides_by_example():
    holes = torch.arange(5).repeat(200)
    y = apply(Cutout(max_holes=4), torch.ones(1000, 1, 50, 50), torch.ones(1000), holes)
    cut = (y == 0).sum((1, 2, 3))
    assert (cut <= holes).all()  # two holes of one pixel may coincide
    assert (cut == holes).float().mean() > 0.98


# --- flip and crop


def test_flip_rate_by_example():
    x = normalised(n=1).expand(9000, -1, -1, -1)
    rates = torch.tensor([0.0, 0.3, 1.0]).repeat_interleave(3000)
    y = apply(Flip(), x, rates)
    flipped = (y == x.flip(3)).flatten(1).all(1)
    assert torch.equal(~flipped, (y == x).flatten(1).all(1))
    never, sometimes, always = flipped.float().reshape(3, 3000).mean(1)
    assert (never, always) == (0, 1)
    assert abs(sometimes - 0.3) < 4 * math.sqrt(0.21 / 3000)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 3),
    paddings=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_crop_is_a_slice_of_the_padded_image(height, width, channels, paddings, seed):
    x = torch.randn(len(paddings), channels, height, width)
    y = apply(Crop(), x, [float(padding) for padding in paddings], seed=seed)
    for image, got, padding in zip(x, y, paddings, strict=True):
        padded = F.pad(image, [padding] * 4)
        tops = lefts = range(2 * padding + 1)
        slices = (padded[:, top : top + height, left : left + width] for top, left in itertools.product(tops, lefts))
        assert any(torch.equal(got, one) for one in slices)


def test_crop_shifts_are_uniform():
    n, padding = 9000, 1
    x = torch.zeros(n, 1, 5, 5)
    x[:, :, 2, 2] = 1
    where = apply(Crop(), x, 1.4).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=25).reshape(5, 5)
    assert counts.sum() == counts[1:4, 1:4].sum()
    share = 1 / (2 * padding + 1) ** 2
    assert ((counts[1:4, 1:4] / n - share).abs() < 4.5 * math.sqrt(share * (1 - share) / n)).all()


def test_crop_stays_within_the_padding_when_rounding_goes_up():
    x = normalised()
    assert torch.equal(apply(Crop(), x, 1.0, draw=1 - 2**-24), F.pad(x, [0, 1, 0, 1])[:, :, 1:, 1:])


# --- affine maps


@pytest.mark.parametrize("angle, turns", [(90.0, 1), (180.0, 2)])
def test_quarter_turns_are_exact_on_square_images(angle, turns):
    x = normalised(height=7, width=7, dtype=torch.float64)
    y = apply(Affine(rotation="r"), x, angle, draw=1.0)
    assert torch.allclose(y, torch.rot90(x, -turns, (2, 3)), atol=1e-10)


def test_half_turns_are_exact_on_any_image():
    x = normalised(height=5, width=8, dtype=torch.float64)
    assert torch.allclose(apply(Affine(rotation="r"), x, 180.0, draw=1.0), x.flip(2, 3), atol=1e-10)


def test_translation_by_whole_pixels():
    x = normalised(height=8, width=12, dtype=torch.float64)
    y = apply(Affine(translation="t"), x, 0.25, draw=1.0)
    assert torch.allclose(y, F.pad(x, [3, 0, 2, 0])[:, :, :8, :12], atol=1e-12)


def test_scale_by_two_is_bilinear_enlargement():
    x = normalised(height=8, width=12, dtype=torch.float64)
    y = apply(Affine(scale="s"), x, 1.0, draw=1.0)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(y, enlarged[:, :, 4:12, 6:18], atol=1e-12)


def test_shear_by_45_degrees_moves_each_row_by_its_distance_from_the_centre():
    x = normalised(height=5, width=9, dtype=torch.float64)
    y = apply(Affine(shear="s"), x, 45.0, draw=1.0)
    for row in range(5):
        shift = row - 2
        expected = F.pad(x[:, :, row], [shift, -shift])
        assert torch.allclose(y[:, :, row], expected, atol=1e-10)


def test_affine_composition_against_scipy():
    height, width = 9, 13
    x = normalised(n=1, height=height, width=width, dtype=torch.float64)
    rotation, translation, scale, shear = 25.0, 0.1, 0.2, 10.0
    y = apply(Affine("r", "t", "s", "h"), x, rotation, translation, scale, shear, draw=1.0)[0]
    cos, sin, lean = (f(math.radians(a)) for f, a in ((math.cos, 25), (math.sin, 25), (math.tan, 10)))
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, lean], [0, 1]]) * (1 + scale)
    # scipy has rows before columns
    inverse = np.linalg.inv(forward)[::-1, ::-1]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = centre - inverse @ (centre + translation * np.array([height, width]))
    for channel, got in zip(x[0], y, strict=True):
        expected = ndimage.affine_transform(channel.numpy(), inverse, offset, order=1, mode="grid-constant")
        assert np.allclose(got.numpy(), expected, atol=1e-10)


def test_affine_draws_are_uniform_either_way():
    # images of their own coordinates show where pixels come from
    n = 4000
    column = torch.linspace(-4, 4, 9, dtype=torch.float64).expand(n, 1, 9, 9)
    shift = -apply(Affine(translation="t"), column, 0.2)[:, 0, 4, 4]
    assert shift.abs().max() <= 1.8 + 1e-9
    assert abs(shift.mean()) < 4 * shift.std() / math.sqrt(n)
    assert abs(shift.std() - 1.8 / math.sqrt(3)) < 0.05
    growth = -apply(Affine(scale="s"), column, 0.5)[:, 0, 4, 5].log()
    assert growth.abs().max() <= math.log(1.5) + 1e-9
    assert abs(growth.mean()) < 4 * growth.std() / math.sqrt(n)
    assert abs(growth.std() - math.log(1.5) / math.sqrt(3)) < 0.02


def test_tuning_more_leaves_other_draws():
    x = normalised()
    assert torch.equal(apply(Affine(rotation="r"), x, 20.0), apply(Affine("r", "t", "s", "h"), x, 20.0, 0.0, 0.0, 0.0))


def test_affine_wants_a_name():
    with pytest.raises(InputError, match="nothing to tune"):
        Affine()


@pytest.mark.parametrize("most", [0, -1, 2.5, 2.0, True, "2", None])
def test_cutout_wants_a_whole_number_of_holes(most):
    with pytest.raises(InputError, match=f"max_holes={most!r}: it must be a whole number of at least 1"):
        Cutout(max_holes=most)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(rotation="same", translation="same"),
        lambda: Affine("r", "t", "same", "same"),
        lambda: Cutout(length="same", holes="same"),
    ],
)
def test_each_strength_wants_a_name_of_its_own(make):
    with pytest.raises(InputError, match="has the name 'same' for two hyperparameters: give each its own"):
        make()


@pytest.mark.parametrize("make", [Brightness, Contrast, Saturation, Hue])
def test_one_number_is_for_all_channels(make):
    x = normalised()
    assert torch.equal(apply(make(0.5, 0.25), x, 0.4), apply(make((0.5,), (0.25,)), x, 0.4))
    assert torch.equal(apply(make(mean=0, std=1), x, 0.4), apply(make([0.0], [1.0]), x, 0.4))
    with pytest.raises(InputError, match=r"mean=125\.3 and std=63\.0: give those of pixels in"):
        make(125.3, 63.0)


# --- colours


def factors(regulariser, n, strength, pixel, reference):
    """The factor by which each of n pictures' pixel was taken from a reference, where nothing is clipped."""
    image = torch.tensor(pixel, dtype=torch.float64)[:, None, None].expand(n, -1, 2, 2)
    y = apply(regulariser, image, strength)[:, 0, 0, 0]
    return (y - reference) / (pixel[0] - reference)


@pytest.mark.parametrize("strength, lower, upper", [(0.5, 0.5, 1.5), (2.0, 0.0, 3.0)])
def test_brightness_and_saturation_factors_are_uniform(strength, lower, upper):
    n = 4000
    for found in (
        factors(Brightness(*PLAIN), n, strength, [0.3], 0.0),
        factors(Saturation(*PLAIN), n, strength, [0.45, 0.4, 0.4], 0.299 * 0.45 + 0.701 * 0.4),
    ):
        assert found.min() >= lower - 1e-9
        assert found.max() <= upper + 1e-9
        assert abs(found.mean() - (lower + upper) / 2) < 4 * found.std() / math.sqrt(n)
        assert abs(found.std() - (upper - lower) / math.sqrt(12)) < 0.03


@pytest.mark.parametrize("make", [Brightness, Contrast, Saturation])
@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0])
def test_factors_by_closed_form(make, draw):
    x = normalised(dtype=torch.float64)
    y = apply(make(MEAN, STD), x, torch.tensor(0.4, dtype=torch.float64), draw=draw)
    factor = 0.6 + 0.8 * draw
    for image, got in zip(x.numpy(), y.numpy(), strict=True):
        pixels = [image[c] * STD[c] + MEAN[c] for c in range(3)]
        grey = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
        reference = {Brightness: 0.0, Contrast: grey.mean(), Saturation: grey}[make]
        for c in range(3):
            expected = np.clip(factor * pixels[c] + (1 - factor) * reference, 0, 1)
            assert np.allclose(got[c] * STD[c] + MEAN[c], expected, atol=1e-12)


def test_strength_of_one_can_remove_contrast_and_colour():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert apply(Contrast(*PLAIN), x, 1.0, draw=0.0).std((1, 2, 3)).max() < 1e-6
    assert apply(Saturation(*PLAIN), x, 1.0, draw=0.0).std(1).max() < 1e-6
    assert not apply(Brightness(*PLAIN), x, 1.0, draw=0.0).any()


def test_contrast_of_one_channel_is_about_its_mean():
    x = 0.4 + 0.1 * torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(apply(Contrast(*PLAIN), x, 0.5, draw=1.0), mean + 1.5 * (x - mean))


def test_hue_shift_by_a_third_permutes_channels():
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(apply(Hue(*PLAIN), x, 0.5, draw=5 / 6), x.roll(1, 1), atol=1e-12)


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.1, 0.45])
def test_hue_against_colorsys(shift):
    x = normalised(n=2, dtype=torch.float64)
    mean, std = (torch.tensor(by_channel, dtype=torch.float64)[:, None, None] for by_channel in (MEAN, STD))
    pixels = (x * std + mean).permute(0, 2, 3, 1).reshape(-1, 3)
    got = (apply(Hue(MEAN, STD), x, 0.5, draw=0.5 + shift) * std + mean).permute(0, 2, 3, 1).reshape(-1, 3)
    for pixel, new in zip(pixels.tolist(), got.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert new == pytest.approx(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), abs=1e-9)


def test_hue_leaves_grey_with_a_finite_gradient():
    x = torch.full((2, 3, 2, 2), 0.3, requires_grad=True)
    y = apply(Hue(*PLAIN), x, 0.5)
    assert torch.equal(y, x)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("make", [Saturation, Hue])
def test_colours_need_three_channels(make):
    with pytest.raises(InputError, match=f"{make.__name__} needs images of 3 channels"):
        apply(make(*PLAIN), torch.zeros(2, 1, 4, 4), 0.1)


def test_mean_and_deviation_fit_the_images():
    with pytest.raises(InputError, match=r"Brightness has mean=\(0.5, 0.4, 0.3\), but images have 1 channels"):
        apply(Brightness(MEAN, STD), torch.zeros(2, 1, 4, 4), 0.1)
    with pytest.raises(InputError, match="give those of pixels in"):
        Contrast((125.3,), (63.0,))
    with pytest.raises(InputError, match="give those of pixels in"):
        Contrast((0.5,), (0.0,))
