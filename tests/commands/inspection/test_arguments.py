import pytest

from qlora_lightning.commands import training
from qlora_lightning.commands.inspection import facts
from qlora_lightning.commands.inspection.arguments import KNOWN_KEYS, Options, make_data_module, parse
from qlora_lightning.support.errors import UserError

CONFIG = """
seed_everything: 7
model: {base: tiny, rank: 4, lora_options: {use_dora: true}}
data: {train: a.jsonl, max_length: 256}
gpu_memory: null
throughput: {enabled: false}
trainer: {max_epochs: 3}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from qlora_lightning import InstructionDataModule\n"
        "class Mine(InstructionDataModule):\n"
        "    def __init__(self, count: int = 1, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.count = count\n"
    )

    def write(text=CONFIG):
        (tmp_path / "c.yaml").write_text(text)

    write()
    return write


def test_options_and_config_come_in_any_order(write):
    line = "--row 3 --config c.yaml --trainer.devices 4 --row a.jsonl:9 --longest --data.max_length=99 --search=-x"
    line += " --model.base other --shortest --html p.html --split val --gpu_memory false --trainer.logger.class_path x"
    options, config = parse(line.split())
    assert options == Options("val", ("3", "a.jsonl:9"), True, True, "-x", "p.html")
    assert (config.name, config.seed, config.trainer["devices"], config.trainer["max_epochs"]) == ("c.yaml", 7, 4, 3)
    assert config.model["base"] == "other"
    data = make_data_module(config)
    assert (data.max_length, config.data.init_args.tokenizer) == (99, "other")


@pytest.mark.parametrize(
    ("arguments", "tokenizer"),
    [
        ("--model.revision v2", {"name": "tiny", "revision": "v2", "trust_remote_code": False}),
        ("--model.trust_remote_code true", {"name": "tiny", "revision": None, "trust_remote_code": True}),
        ("--model.trust_remote_code false --model.revision null", "tiny"),
        ("--model.trust_remote_code=FALSE", "tiny"),
    ],
)
def test_the_tokenizer_is_the_base_s_of_the_same_revision(write, arguments, tokenizer):
    _, config = parse(["--config", "c.yaml", *arguments.split()])
    make_data_module(config)
    assert config.data.init_args.tokenizer == tokenizer


def test_a_tokenizer_of_its_own_and_no_config_at_all(write):
    _, config = parse(["--data.train", "a.jsonl", "--data.tokenizer", "mine"])
    make_data_module(config)
    assert (config.data.init_args.tokenizer, config.seed, config.name) == ("mine", 42, "")


@pytest.mark.parametrize(
    "data", ["{class_path: mine.Mine, count: 5}", "{class_path: mine.Mine, init_args: {count: 5}}"]
)
def test_a_subclass_by_its_path(write, data):
    write(f"model: {{base: tiny}}\ndata: {data}\n")
    made = make_data_module(parse(["--config", "c.yaml", "--data.max_length", "77"])[1])
    assert (type(made).__name__, made.count, made.max_length) == ("Mine", 5, 77)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--data.mx_length 3", "There is no key 'data.mx_length'. Did you mean data.max_length? (on the command line)"),
        ("--data.max_length q", "data.max_length is q: expected an integer."),
        ("--data.on_bad_row no", "data.on_bad_row is no: expected one of error, skip."),
        ("--spilt val", "There is no key 'spilt'. Did you mean split? (on the command line)"),
        ("--modle.base x", "There is no key 'modle'. Did you mean model? (on the command line)"),
        ("--split vl", "argument --split: invalid choice: 'vl'"),
        ("--row", "argument --row: expected one argument. See `qlora-lightning inspect --help`."),
        ("stray", "unrecognized arguments: stray. See `qlora-lightning inspect --help`."),
        ("--config no.yaml", "no.yaml, but there is no such file."),
    ],
)
def test_a_wrong_argument_is_one_sentence(write, arguments, sentence):
    with pytest.raises(UserError) as caught:
        parse(["--config", "c.yaml", *arguments.split()])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            "data: {train: a.jsonl, batchsize: 3}\n",
            "There is no key 'data.batchsize'. Did you mean data.batch_size? (in c.yaml)",
        ),
        ("data: {}\ngpu_memroy: {}\n", "There is no key 'gpu_memroy'. Did you mean gpu_memory? (in c.yaml)"),
        ("data: {train: a.jsonl\n", "The config is not YAML: while parsing a flow mapping"),
        ("data: {class_path: nowhere.Mine}\n", "class_path 'nowhere.Mine' cannot be used: No module named 'nowhere'."),
    ],
)
def test_a_wrong_config_is_one_sentence(write, config, sentence):
    write(config)
    with pytest.raises(UserError) as caught:
        parse(["--config", "c.yaml"])
    assert str(caught.value).startswith(sentence)


def test_without_a_base_it_says_what_it_would_be_for(write):
    with pytest.raises(UserError, match=r"model\.base is missing: the data are rendered with its tokenizer"):
        make_data_module(parse(["--data.train", "a.jsonl"])[1])


def test_what_the_data_module_refuses_is_worded_by_it(write):
    with pytest.raises(UserError, match="val and val_fraction are both given"):
        make_data_module(parse(["--config", "c.yaml", "--data.val", "b.jsonl", "--data.val_fraction", "0.5"])[1])


def test_the_keys_and_defaults_are_those_of_fit():
    assert KNOWN_KEYS.keys() == training._KNOWN_KEYS.keys()
    assert training._TRAINER_DEFAULTS["max_epochs"] == facts._DEFAULT_EPOCHS


def test_help_says_what_a_row_number_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "show the row that begins in line N of its file, from 1, as messages name it" in text
    assert "qlora-lightning inspect --config configs/quickstart.yaml --row 17" in text
