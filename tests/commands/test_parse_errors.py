import json

import pytest

from qlora_lightning.cli import main
from qlora_lightning.commands.parse_errors import word_parse_error

DATA = "data: {train: rows.jsonl}\n"
GOOD = f"model: {{base: tiny}}\n{DATA}"


@pytest.fixture
def refuse(tiny_base, tmp_path, monkeypatch, capsys):
    """Run `fit` on a config and more arguments; gives the sentence with which it is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    (tmp_path / "c.yaml").write_text(GOOD)

    def run(*arguments, config=None):
        if config is not None:
            (tmp_path / "c.yaml").write_text(config)
        assert main(["fit", "--config", "c.yaml", "--trainer.accelerator", "cpu", *arguments]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("qlora-lightning: ")]
        assert len(lines) == 1
        assert captured.err.rstrip().endswith(lines[0])
        assert "usage:" not in captured.out + captured.err
        assert "Traceback" not in captured.err
        assert not list((tmp_path / "runs" / "default").rglob("*.ckpt"))
        return lines[0].removeprefix("qlora-lightning: ")

    return run


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            "model: {base: tiny, rnk: 3}\n" + DATA,
            "There is no key 'model.rnk'. Did you mean model.rank? (in c.yaml)",
        ),
        (
            "model: {base: tiny}\ndata: {train: rows.jsonl, batchsize: 3}\n",
            "There is no key 'data.batchsize'. Did you mean data.batch_size? (in c.yaml)",
        ),
        (
            GOOD + "trainer: {max_epoch: 3}\n",
            "There is no key 'trainer.max_epoch'. Did you mean trainer.max_epochs? (in c.yaml)",
        ),
        (
            GOOD + "adapter_checkpoint: {save_topk: 3}\n",
            "There is no key 'adapter_checkpoint.save_topk'. Did you mean adapter_checkpoint.save_top_k? (in c.yaml)",
        ),
        (
            GOOD + "gpu_memroy: {enabled: false}\n",
            "There is no key 'gpu_memroy'. Did you mean gpu_memory? (in c.yaml)",
        ),
        (GOOD + "ckpt_pth: last\n", "There is no key 'ckpt_pth'. Did you mean ckpt_path? (in c.yaml)"),
        ("model: {base: tiny, rank: eight}\n" + DATA, "model.rank is eight: expected an integer."),
        ("model: {base: tiny, learning_rate: fast}\n" + DATA, "model.learning_rate is fast: expected a number."),
        (
            "model: {base: tiny, quantization: nf5}\n" + DATA,
            "model.quantization is nf5: expected one of nf4, fp4, int8, none.",
        ),
        (
            "model: {base: tiny}\ndata: {train: rows.jsonl, train_on: everything}\n",
            "data.train_on is everything: expected one of assistant, last, all.",
        ),
        (GOOD + "trainer: {max_epochs: many}\n", "trainer.max_epochs is many: expected an integer or null."),
        (GOOD + "throughput: {enabled: maybe}\n", "throughput.enabled is maybe: expected true or false."),
        (
            GOOD + "gradient_checkpointing: {every_n_layers: 0}\n",
            "gradient_checkpointing.every_n_layers is 0: expected 1 or more.",
        ),
        (
            "model: {class_path: nowhere.Mine, base: tiny}\n" + DATA,
            "class_path 'nowhere.Mine' cannot be used: No module named 'nowhere'. (in c.yaml)",
        ),
        ("model: {base: tiny, rank: -1}\n" + DATA, "model.rank is -1: expected a positive integer, such as 8."),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(refuse, config, sentence):
    assert refuse(config=config) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model.rnk 3", "There is no key 'model.rnk'. Did you mean model.rank? (on the command line)"),
        (
            "--data.batchsize=3",
            "There is no key 'data.batchsize'. Did you mean data.batch_size? (on the command line)",
        ),
        (
            "--trainer.max_epoch 3",
            "There is no key 'trainer.max_epoch'. Did you mean trainer.max_epochs? (on the command line)",
        ),
        (
            "--throughput.enable true",
            "There is no key 'throughput.enable'. Did you mean throughput.enabled? (on the command line)",
        ),
        ("--gpu_memroy null", "There is no key 'gpu_memroy'. Did you mean gpu_memory? (on the command line)"),
        ("--modle.rank 3", "There is no key 'modle'. Did you mean model? (on the command line)"),
        ("--model.rank x", "model.rank is x: expected an integer."),
        ("--model.quantization nf5", "model.quantization is nf5: expected one of nf4, fp4, int8, none."),
        ("--adapter_checkpoint.mode mn", "adapter_checkpoint.mode is mn: expected one of min, max."),
        ("--ckpt_path no.ckpt", "--ckpt_path no.ckpt: there is no such file. Expected a .ckpt file, or `last`."),
        ("--model.rank -3", "model.rank is -3: expected a positive integer, such as 8."),
        ("--model.dropout 1.5", "model.dropout is 1.5: expected a probability in [0, 1)."),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(refuse, arguments, sentence):
    assert refuse(*arguments.split()) == sentence


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--model.base missing", "Base 'missing': no such file or folder. A base is a hub id"),
        ("--data.train raws.jsonl", "data file raws.jsonl does not exist (paths are relative to the current folder, "),
        ("--trainer.precision bf16-true", "it would cast the adapters' float32 masters down"),
        ("--model.schedule cosin", "expected a name among constant, "),
        ("--model.adapter nodir", "nodir is not an adapter folder: expected adapter_config.json"),
    ],
)
def test_what_only_shows_later_is_worded_alike(refuse, arguments, part):
    assert part in refuse(*arguments.split())


def test_broken_yaml_is_refused_with_its_place(refuse):
    sentence = refuse(config="model: {base: tiny\ndata: {}\n")
    assert sentence.startswith("The config is not YAML: while parsing a flow mapping")
    assert "(line " in sentence
    assert sentence.endswith(".yaml)")  # of which file


def test_a_missing_base_is_refused_with_where_to_name_it(refuse):
    sentence = refuse(config=DATA)
    assert sentence.startswith("model.base is missing: name a hub id, a folder, a .gguf file or package:NAME")


def test_a_missing_config_is_refused_by_name(refuse):
    assert refuse("--config", "nowhere.yaml").startswith("--config names ")


def test_without_a_near_key_all_are_listed(refuse):
    assert "There is no key 'data.zzz'. Keys here are train, val, " in refuse("--data.zzz", "1")


def test_an_unknown_key_with_nothing_in_it_is_refused_too(refuse):
    sentence = refuse("--ckpt_path", "no.ckpt", config=GOOD + "gpu_memroy: {}\n")
    assert sentence == "There is no key 'gpu_memroy'. Did you mean gpu_memory? (in c.yaml)"


@pytest.mark.parametrize("path", ["qlora_lightning.Nope", "json.JSONDecoder"])
@pytest.mark.parametrize("key", ["model", "data"])
def test_a_class_that_is_not_there_or_of_another_kind_is_refused_by_its_name(refuse, key, path):
    sections = {"model": "{base: tiny}", "data": "{train: rows.jsonl}"} | {key: f"{{class_path: {path}}}"}
    sentence = refuse(config=f"model: {sections['model']}\ndata: {sections['data']}\n")
    assert sentence.startswith(f"class_path '{path}' cannot be used: ")


@pytest.mark.parametrize("config", ["", "- a\n- b\n"])
def test_a_config_that_is_no_mapping_is_refused_with_what_is_wrong(refuse, config):
    assert "c.yaml" in refuse(config=config)


@pytest.mark.parametrize(("key", "value"), [("accelerator", "tpuu"), ("devices", "0"), ("strategy", "dpp")])
def test_a_trainer_setting_that_lightning_refuses_is_worded_alike(refuse, key, value):
    assert value in refuse(f"--trainer.{key}", value)


def test_what_nobody_foresaw_keeps_its_first_line_and_names_the_help():
    error = word_parse_error("Something odd\nand more", ["fit"], {})
    assert str(error) == "Something odd. See `qlora-lightning fit --help`."
    assert "not understood" in str(word_parse_error("", [], {}))
