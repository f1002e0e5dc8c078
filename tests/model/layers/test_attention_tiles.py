"""A stream of two samples, of 70 tokens and of 2, over two key heads: three tiles' worth of rows."""

import itertools

import torch

from qlora_lightning.model.layers.attention_tiles import TILE, Layout, Tile, lay_out, tiles_of

LAYOUT = Layout((0, 2, 72), kv_heads=2)


def row(token, head):
    return 2 * token + head


def test_a_tile_holds_all_samples_that_reach_it():
    assert TILE == 64
    assert list(tiles_of([2, 70])) == list(LAYOUT.tiles) == [Tile(2, 64), Tile(1, 128)]
    assert list(tiles_of([64, 128, 1])) == [Tile(3, 64), Tile(1, 128)]


def test_rows_lie_by_tile_sample_key_head_and_token():
    long = [[row(2 + token, head) for token in range(64)] for head in range(2)]
    short = [[row(0, head), row(1, head), *[row(1, head)] * 62] for head in range(2)]
    rest = [[row(min(2 + token, 71), head) for token in range(64, 128)] for head in range(2)]
    assert LAYOUT.rows.tolist() == [*itertools.chain(*short, *long, *rest)]


def test_keys_lie_in_each_tile_that_sees_them():
    short = [[row(0, head), row(1, head), *[row(1, head)] * 62] for head in range(2)]
    first, second = (
        [[row(min(2 + token, 71), head) for token in range(seen)] for head in range(2)] for seen in (64, 128)
    )
    assert LAYOUT.keys.tolist() == [*itertools.chain(*short, *first, *second)]


def test_every_row_has_one_place_and_all_others_are_filled_up():
    assert torch.equal(LAYOUT.rows[LAYOUT.places], torch.arange(144))
    assert sorted([*LAYOUT.places.tolist(), *LAYOUT.filled.tolist()]) == list(range(len(LAYOUT.rows)))


def test_places_of_a_key_are_where_its_row_lies_behind_no_end():
    places, begins = LAYOUT.places_of_keys
    first, last = places[begins[row(2, 1)] : begins[row(3, 0)]], places[begins[row(71, 1)] :]
    assert first.tolist() == [128 + 64, 256 + 128]  # seen in both tiles, by the second key head
    assert last.tolist() == [256 + 128 + 69]
    assert len(places) == 2 * (2 + 64 + 70)


def test_layers_of_a_batch_share_their_layout():
    assert lay_out((0, 2, 72), 2) is lay_out((0, 2, 72), 2)
    assert lay_out((0, 2, 72), 2, torch.arange(72).numpy().tobytes()) is not lay_out((0, 2, 72), 2)


# Two samples of 4 and of 70 tokens; the first 3 of the shorter one are computed with the longer one: a stream of 71.
SHARED = Layout((0, 4, 74), 1, torch.tensor([1, 2, 3, 0, *range(1, 71)]))


def test_shared_tokens_have_queries_in_one_sample_and_keys_in_both():
    assert list(SHARED.tiles) == [Tile(2, 64), Tile(1, 128)]
    assert SHARED.keys[:64].tolist() == [1, 2, 3, *[0] * 61]
    assert torch.equal(SHARED.rows[SHARED.places], torch.arange(71))
    assert SHARED.places[:4].tolist() == [3, 64, 65, 66]
    assert {0, 1, 2} <= set(SHARED.filled.tolist())
    places, begins = SHARED.places_of_keys
    assert places[begins[1] : begins[2]].tolist() == [0, 64, 128]  # the shorter sample, and both tiles of the longer


def test_a_tile_of_nothing_but_shared_tokens_has_no_place_for_them():
    assert list(tiles_of([130, 140, 65], [129, 0, 64])) == [Tile(1, 64), Tile(2, 128), Tile(2, 192)]
    layout = Layout((0, 130, 270), 1, torch.tensor([*range(129), 129, *range(129), *range(130, 141)]))
    assert list(layout.tiles) == [Tile(1, 64), Tile(1, 128), Tile(2, 192)]
    assert torch.equal(layout.rows[layout.places], torch.arange(141))


def test_parts_of_a_tile_are_batches_of_matrices():
    queries, keys = torch.zeros(len(LAYOUT.rows), 3 * 8), torch.zeros(len(LAYOUT.keys), 8)
    assert [part.shape for part in LAYOUT.split_rows(queries, 8)] == [(4, 192, 8), (2, 192, 8)]
    assert [part.shape for part in LAYOUT.split_keys(keys, 8)] == [(4, 64, 8), (2, 128, 8)]
