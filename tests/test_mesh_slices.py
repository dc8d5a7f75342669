"""Meshes over several slices: what crosses the network between them is `replica`, then `fsdp`, and never `tensor`."""

import dataclasses
import random

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.machine.targets import load_mesh, same_devices


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "stand-in"
    device_kind: str = "stand-in"


def devices(slices: int, each: int) -> list[Device]:
    found = [Device(k, k // each, k // 4) for k in range(slices * each)]
    random.Random(0).shuffle(found)  # jax sorts them by process, which need not be by slice
    return found


def slice_of(mesh) -> np.ndarray:
    """Slice of each device, [replica, fsdp, tensor]."""
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def test_each_slice_is_a_replica():
    at = slice_of(make_mesh(replica=2, fsdp=4, tensor=2, devices=devices(2, 8)))
    assert at.shape == (2, 4, 2)
    assert (at[0] == 0).all() and (at[1] == 1).all()


def test_more_replicas_than_slices_share_them():
    at = slice_of(make_mesh(replica=4, fsdp=2, tensor=2, devices=devices(2, 8)))
    assert (at == np.array([0, 0, 1, 1])[:, None, None]).all()


def test_parameters_over_all_slices():
    at = slice_of(make_mesh(fsdp=-1, tensor=2, devices=devices(2, 8)))
    assert (at == np.array([0] * 4 + [1] * 4)[None, :, None]).all()


def test_both_axes_cross():
    at = slice_of(make_mesh(replica=2, fsdp=4, tensor=2, devices=devices(4, 4)))
    assert all(len(set(at[r, f])) == 1 for r in range(2) for f in range(4))
    assert len(set(at[0].ravel())) == len(set(at[1].ravel())) == 2 and set(at[0].ravel()) & set(at[1].ravel()) == set()


def test_tensor_never_crosses():
    with pytest.raises(InputError, match="2 slices.*tensor 16 stays inside of one.*use replica 2"):
        make_mesh(fsdp=1, tensor=16, devices=devices(2, 8))


def test_two_slices_of_v5e():
    target = load_mesh("v5e_16x2")
    mesh = make_mesh(**dataclasses.asdict(target.train), devices=devices(2, 16))
    at = slice_of(mesh)
    assert (at == np.arange(2)[:, None, None]).all()
    sampling = slice_of(same_devices(mesh, target.sample))
    assert (sampling[..., 0] == sampling[..., 1]).all()  # heads are split inside of a slice


def test_two_slices_as_the_compiler_has_them():
    target = load_mesh("v5e_16x2")
    try:
        found = target.compile_devices()
    except InputError as error:
        pytest.skip(str(error))
    at = slice_of(make_mesh(**dataclasses.asdict(target.train), devices=found))
    assert len({*at[0].ravel()}) == len({*at[1].ravel()}) == 1 and at[0, 0, 0] != at[1, 0, 0]
