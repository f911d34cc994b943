"""Layout on the mesh: what is really on each device."""

import jax
import jax.numpy as jnp
import numpy as np

from rlft.parallel import sharding

TREE = {"conv": np.ones((3, 3, 64, 32), np.float32), "bias": np.ones((32,), np.float32)}


def test_mesh_uses_all_devices():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
  assert dict(sharding.make_mesh(4).shape) == {"data": 2, "fsdp": 4}


def test_parameters_are_sharded_by_their_largest_axis():
  mesh = sharding.make_mesh(4)
  placed = sharding.put(TREE, sharding.parameters(mesh, TREE))
  assert placed["conv"].addressable_shards[0].data.shape == (3, 3, 16, 32)
  assert placed["bias"].addressable_shards[0].data.shape == (32,)  # too small to be worth it
  np.testing.assert_array_equal(placed["conv"], TREE["conv"])


def test_one_shard_is_data_parallel():
  mesh = sharding.make_mesh()
  placed = sharding.put(TREE, sharding.parameters(mesh, TREE))
  assert placed["conv"].addressable_shards[0].data.shape == TREE["conv"].shape


def test_gather_is_whole_and_scatter_sums_over_devices():
  mesh = sharding.make_mesh(4)
  where = sharding.specs(mesh, TREE)
  rng = np.random.default_rng(0)
  factors = {k: rng.normal(size=(8, *v.shape)).astype(np.float32) for k, v in TREE.items()}

  def local(tree, factors):
    whole = sharding.gather(tree, where)
    assert jax.tree.map(lambda x: x.shape, whole) == jax.tree.map(lambda x: x.shape, TREE)

    def loss(whole):
      return sum((whole[name] * factors[name][0]).sum() for name in whole)

    return sharding.scatter(jax.grad(loss)(whole), where)

  run = sharding.on_each(mesh, local, in_specs=(where, sharding.ROWS), out_specs=where)
  result = jax.jit(run)(sharding.place(mesh, TREE), factors)
  for name in TREE:
    np.testing.assert_allclose(result[name], factors[name].sum(0), rtol=1e-5, atol=1e-5)
  assert result["conv"].addressable_shards[0].data.shape == (3, 3, 16, 32)


def test_batch_is_spread_over_both_axes():
  mesh = sharding.make_mesh(2)
  rows = sharding.put(np.arange(16.0), sharding.batch(mesh))
  assert [s.data.shape for s in rows.addressable_shards] == [(2,)] * 8
  time_major = jax.device_put(jnp.zeros((3, 16)), jax.NamedSharding(mesh, sharding.COLUMNS))
  assert time_major.addressable_shards[0].data.shape == (3, 2)


def test_a_batch_of_which_a_process_has_its_own_rows():
  rows = sharding.batch(sharding.make_mesh())
  assert sharding.own_rows(rows, 16).tolist() == list(range(16))
  # Rows 4 and 5 are the third device's; nobody here reads the others.
  placed = sharding.put_own(np.array([[7], [8]]), np.array([4, 5]), 16, rows)
  (third,) = (shard.data for shard in placed.addressable_shards if shard.index[0].start == 4)
  assert placed.shape == (16, 1) and third.tolist() == [[7], [8]]
