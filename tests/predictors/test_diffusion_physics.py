"""The arithmetic of diffusion: it meets published timings and peaks, grows with size, and knows GPUs by their drivers' names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictors import physics
from predictors.physics import GIB, GPUS, SD15, SDXL


@pytest.mark.parametrize(
    ("seconds", "published"),
    [
        # An A100 with scaled-dot-product attention, and a card of 16 GB whose step takes 16.4 + 36.8 ms for every row.
        (physics.run_seconds(SDXL, steps=30), 3.32),
        (physics.run_seconds(SD15, steps=50, gpu=GPUS["v100"]), 50 * (0.0164 + 0.0368)),
        (physics.run_seconds(SD15, steps=50, images=8, gpu=GPUS["v100"]), 50 * (0.0164 + 8 * 0.0368)),
    ],
)
def test_run_times_come_near_published_ones(seconds: float, published: float) -> None:
    assert seconds == pytest.approx(published, rel=0.12)


def test_a_forward_costs_what_was_counted() -> None:
    assert SD15.forward_flops(512, 512) == pytest.approx(0.803e12, rel=0.01)
    assert SDXL.forward_flops(1024, 1024) == pytest.approx(6.76e12, rel=0.01)


SIZES = st.integers(64, 4096)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([SD15, SDXL]),
    st.sampled_from(sorted(GPUS)),
    st.tuples(SIZES, SIZES, st.integers(1, 200), st.integers(1, 64)),
    st.tuples(SIZES, SIZES, st.integers(1, 200), st.integers(1, 64)),
    st.booleans(),
)
def test_more_of_anything_never_takes_less_time_or_memory(
    family: physics.Family, gpu: str, one: tuple[int, ...], other: tuple[int, ...], guided: bool
) -> None:
    less, more = (tuple(pick(a, b) for a, b in zip(one, other, strict=True)) for pick in (min, max))
    times = [
        physics.run_seconds(
            family, width=each[0], height=each[1], steps=each[2], images=each[3], guided=guided, gpu=GPUS[gpu]
        )
        for each in (less, more)
    ]
    peaks = [physics.peak_bytes(family, pixels=each[0] * each[1], rows=each[3]) for each in (less, more)]
    assert 0 < times[0] <= times[1]
    assert family.weights_bytes < peaks[0] <= peaks[1]


def test_guidance_doubles_the_arithmetic_and_training_counts_forward_and_back() -> None:
    plain, guided = (physics.run_seconds(SDXL, steps=30, guided=guided) for guided in (False, True))
    assert 1.6 < guided / plain < 2.0
    assert physics.run_seconds(SDXL, steps=30, training=True) > 2.5 * guided


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("h100", "h100"),
        ("something else", ""),
        ("", ""),
    ],
)
def test_gpus_are_known_by_the_names_that_drivers_give(name: str, known: str) -> None:
    found = physics.gpu_of(name)
    assert (found.name if found is not None else "") == known


def test_a_family_is_known_by_name_or_by_the_size_of_its_weights() -> None:
    assert physics.family_of("sdxl") is physics.family_of("", 7 * GIB) is SDXL
    assert physics.family_of("SD") is physics.family_of("other", 2 * GIB) is SD15
    assert physics.family_of("other") is None


def test_a_model_is_there_sooner_the_nearer_its_bytes_lie() -> None:
    times = [physics.load_seconds(SDXL.weights_bytes, place) for place in ("gpu", "memory", "disk", "remote")]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[2] < 6 < 20 < times[3] < 45
    with pytest.raises(ValueError, match="source"):
        physics.load_seconds(1, "tape")


def test_training_needs_the_optimiser_s_state_too() -> None:
    adapter = physics.peak_bytes(SD15, training=True)
    full = physics.peak_bytes(SD15, training=True, trained_parameters=SD15.unet_parameters)
    assert physics.peak_bytes(SD15) < adapter < full
    assert full - adapter > 12 * GIB
    assert physics.adapter_bytes(SDXL, 128) == pytest.approx(389 * physics.MIB, rel=0.02)
