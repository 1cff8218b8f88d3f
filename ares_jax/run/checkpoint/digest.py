"""Digests of arrays: 64 bits that change when any bit of an array does, for every sharding.

For the uint32 words u of an array, i being the index of a word in the flat array,

    h = mix(u ^ mix(i)),  digest = (sum of h, sum of mix(h + 1)) mod 2^32

where `mix` is the 32-bit finaliser of MurmurHash3, a bijection. A sum has no order, so every
sharding and every backend gives the same digest. One changed word always changes the digest;
several random changes are missed with probability 2^-64.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1 << 18  # words per block on the host: 1 MiB fits in the cache, four times as fast


def flatten(tree):
  """{path: leaf} of a pytree, with paths such as "params/decoder/q"."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def digest_tree(tree):
  """Digests of the leaves of a pytree, {"blocks/q": 16 hexadecimal digits}.

  Leaves are bool or numbers of 8 to 64 bits; numpy arrays stay on the host.
  """
  # One program per leaf, so that equal shapes compile once. One at a time, since the collectives of
  # CPUs time out when many are queued.
  return {name: _hex(*jax.device_get(_sums(leaf))) if isinstance(leaf, jax.Array)
          else digest_numpy(leaf) for name, leaf in flatten(tree).items()}


def digest_numpy(array):
  """The digest of a numpy array with elements of 1, 2, 4 or 8 bytes, else ValueError."""
  # Block by block, at about 0.1 G words per second.
  size = array.dtype.itemsize
  if size not in (1, 2, 4, 8):
    raise ValueError(f"no digest of {array.dtype}: {size} bytes per element; use 1, 2, 4 or 8")
  words = np.ascontiguousarray(array).reshape(-1).view(f"<u{min(size, 4)}")
  first, second = 0, 0
  for start in range(0, len(words), _BLOCK):
    block = words[start:start + _BLOCK].astype(np.uint32)
    index = np.arange(start, start + len(block), dtype=np.uint64).astype(np.uint32)
    block ^= _mix(index)
    first += int(_mix(block).sum(dtype=np.uint64))
    block += np.uint32(1)
    second += int(_mix(block).sum(dtype=np.uint64))
  return _hex(first, second)


@jax.jit
def _sums(leaf):
  words = _words(leaf)
  # The flat index of each word, without a reshape, which would undo the sharding.
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    along_axis = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += along_axis * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  mixed = _mix(words ^ _mix(index))
  return mixed.sum(dtype=jnp.uint32), _mix(mixed + jnp.uint32(1)).sum(dtype=jnp.uint32)


def _words(leaf):
  """The bits of an array as uint32: a word per element, two for 8 bytes, low half first."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  word = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
  return jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)


def _mix(x):
  """The finaliser of MurmurHash3 for uint32; on numpy arrays it works in place."""
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> np.uint32(13)
  x *= np.uint32(0xC2B2AE35)
  x ^= x >> np.uint32(16)
  return x


def _hex(first, second):
  return f"{int(first) % 2**32:08x}{int(second) % 2**32:08x}"
