from qlora_lightning.data.samples import SampleSetBuilder, digest_rows, digest_samples, find_duplicates, find_overlap


def build(*rows, file="train.jsonl"):
    """One row a line: (ids, labels), or a list of such pieces."""
    builder = SampleSetBuilder()
    for number, row in enumerate(rows):
        for ids, labels in row if isinstance(row, list) else [row]:
            builder.add(ids, labels, number, 0, file, number + 1)
    return builder.build()


A, B = ([1, 2, 3], [-100, 2, 3]), ([1, 2, 4], [-100, 2, 4])
A_LAST = ([1, 2, 3], [-100, -100, 3])  # the tokens of A, other labels


def test_equal_means_the_same_ids_and_labels():
    digests = digest_samples(build(A, B, A, A_LAST)).tolist()
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3
    ids_only = digest_samples(build(A, B, A, A_LAST), labels=False).tolist()
    assert ids_only[0] == ids_only[2] == ids_only[3] != ids_only[1]
    assert set(digests).isdisjoint(digest_samples(build(A, B), key=b"1").tolist())


def test_where_tokens_end_and_labels_begin_counts():
    assert len(set(digest_samples(build(([1, 2], [-100, 2]), ([1], [1]), ([1, 2, 3], [-100, -100, 3]))).tolist())) == 3


def test_duplicates_are_named_with_the_first_of_them():
    found = find_duplicates(build(A, B, A, A_LAST, B, A))
    assert found.rows == 3
    assert found.pairs == [
        ("train.jsonl:3", "train.jsonl:1"),
        ("train.jsonl:5", "train.jsonl:2"),
        ("train.jsonl:6", "train.jsonl:1"),
    ]


def test_the_first_20_are_listed_all_are_counted():
    found = find_duplicates(build(*[A] * 30))
    assert (found.rows, len(found.pairs)) == (29, 20)
    assert found.pairs[-1] == ("train.jsonl:21", "train.jsonl:1")


def test_a_row_in_pieces_is_equal_when_all_its_pieces_are():
    samples = build([A, B], A, B, [A, A_LAST], [A, B])
    digests = digest_rows(samples).tolist()
    assert digests[0] == digests[1] == digests[6] == digests[7]
    assert len(set(digests)) == 4
    assert find_duplicates(samples) == (1, [("train.jsonl:5", "train.jsonl:1")])


def test_overlap_names_both_files():
    train, val = build(A, B, B), build(A_LAST, B, ([7, 8], [-100, 8]), B, file="val.jsonl")
    assert find_overlap(train, val) == (2, [("val.jsonl:2", "train.jsonl:2"), ("val.jsonl:4", "train.jsonl:2")])


def test_no_samples_no_duplicates():
    empty = build()
    assert find_duplicates(empty) == find_overlap(empty, build(A)) == find_overlap(build(A), empty) == (0, [])
