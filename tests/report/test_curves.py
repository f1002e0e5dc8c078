from qlora_lightning.report.curves import charts_of, charts_of_all
from qlora_lightning.report.run import Run


def labels(chart):
    return [series.label for series in chart.series if series.points]


def make(name="a", size=100, **columns):
    points = [(step, 1.0) for step in range(1, 21)]
    metrics = {"train_loss": points, "tokens_seen": [(step, step * size) for step, _ in points], **columns}
    return Run(folder=name, name=name, status="finished", metrics=metrics)


def test_one_run_has_raw_and_smoothed_losses_with_the_bases_level():
    run = make(val_loss=[(10, 0.5)])
    run = Run(**{**vars(run), "evaluation": {"metrics": {"loss": {"base": {"value": 2.0}}}}})
    loss = charts_of(run)[0]
    assert labels(loss) == ["training", "training, mean of 5 steps", "base, validation", "validation"]
    assert [series.style for series in loss.series] == ["faint", "line", "limit", "dots"]


def test_memory_has_the_predicted_level_in_gib():
    run = Run(**{**vars(make(peak_rss_gib=[(1, 2.0)])), "plan": {"predicted": {"peak_bytes": 3 * 1024**3}}})
    memory = charts_of(run)[4]
    assert labels(memory) == ["peak RSS", "peak as predicted"]
    assert memory.series[1].points == [(0, 3.0)]


def test_the_clip_is_shown_only_where_it_clips():
    config = {"trainer": {"gradient_clip_val": 1.0}}
    above = Run(**{**vars(make(grad_norm=[(1, 2.0)])), "config": config})
    below = Run(**{**vars(make(grad_norm=[(1, 0.5)])), "config": config})
    assert labels(charts_of(above)[2]) == ["gradient norm", "clipped to 1"]
    assert labels(charts_of(below)[2]) == ["gradient norm"]


def test_what_users_log_and_further_metrics_get_charts():
    run = make(val_exact_match=[(10, 0.5)], my_own=[(1, 1.0)])
    assert [chart.title for chart in charts_of(run)][5:] == ["Exact match, validation", "My own"]


def test_runs_share_charts_a_curve_a_run():
    loss = charts_of_all([make("a"), make("b")])[1]
    assert labels(loss) == ["a", "b"]
    assert [series.colour for series in loss.series] == [0, 1]
    assert loss.x_label == "optimizer steps"


def test_runs_of_other_batch_sizes_are_compared_by_tokens():
    loss = charts_of_all([make("a"), make("b", size=200)])[1]
    assert loss.x_label == "tokens trained on"
    assert loss.series[1].points[:2] == [(200, 1.0), (400, 1.0)]
    assert charts_of_all([make("a"), make("b", size=200, tokens_seen=[])])[1].x_label == "optimizer steps"
