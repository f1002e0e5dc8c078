import torch

from qlora_lightning.model.layers.kv_cache import KeyValueCache

HEADS, KV_HEADS, DIM = 4, 2, 8


def states(heads, tokens, seed):
    return torch.randn(1, heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def attend_alone(query, keys, values):
    """Attention of one position by its formula, ``(heads, DIM)``; two heads share a key head."""
    shared = HEADS // KV_HEADS
    keys, values = (each.repeat_interleave(shared, 0) for each in (keys, values))  # (heads, tokens, DIM)
    weights = torch.softmax((keys @ query[..., None])[..., 0] / DIM**0.5, -1)  # (heads, tokens)
    return (weights[:, None] @ values)[:, 0]


def test_each_row_attends_to_its_own_tokens_and_rows_that_go_leave_the_others_alone():
    cache = KeyValueCache([2, 5, 3], 2, torch.device("cpu"))
    key, value = states(KV_HEADS, 10, 0), states(KV_HEADS, 10, 1)
    cache.fill(5, key, value)
    seen = [(key[0, :, start:end], value[0, :, start:end]) for start, end in ((0, 2), (2, 7), (7, 10))]
    for step in range(2):
        rows = len(seen)
        query, key, value = states(HEADS, rows, 10 + step), states(KV_HEADS, rows, 20), states(KV_HEADS, rows, 30)
        seen = [
            (torch.cat([keys, key[0, :, [row]]], 1), torch.cat([values, value[0, :, [row]]], 1))
            for row, (keys, values) in enumerate(seen)
        ]
        cache.begin_step()
        mixed = cache.attend(5, query, key, value, None)
        cache.end_step()
        assert mixed.shape == (1, rows, HEADS, DIM)
        for row, (keys, values) in enumerate(seen):
            torch.testing.assert_close(mixed[0, row], attend_alone(query[0, :, row], keys, values))
        if step == 0:
            cache.keep([0, 2])  # the longest row goes
            seen = [seen[0], seen[2]]
    assert cache.lengths.tolist() == [4, 5]
