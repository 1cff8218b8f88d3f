"""A mesh of one device that programs can be lowered on for a GPU which this host lacks."""

import contextlib

import jax

from ares_jax.system import mesh as mesh_lib


@contextlib.contextmanager
def one_device(platform):
  """Makes a mesh of one device current; "cuda" describes an NVIDIA GPU to Triton's lowering."""
  mesh = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  described = mesh.abstract_mesh.update(abstract_device=device if platform == "cuda" else None)
  with jax.set_mesh(mesh), jax.sharding.use_abstract_mesh(described):
    yield
