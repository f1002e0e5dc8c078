"""A run on a card: exact resumes, from the host too, a seed's adapters, memory as planned, answers, and plain PEFT."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from lightning import Callback, seed_everything
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning import AdapterCheckpoint, GradientCheckpointing, QLoRAModule, ShardedDDPStrategy
from qlora_lightning.cli import main
from tests.distributed.hooks import Ask
from tests.equality import metrics, read_checkpoint, same
from tests.errors import MachineFailed
from tests.gpu.conftest import DEVICE, make_base, make_module
from tests.rows import write_rows
from tests.steps import fit, make_batch, trainable_tensors

pytestmark = pytest.mark.gpu
ACCELERATOR = "gpu" if DEVICE.type == "cuda" else "cpu"
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


def train(folder, base, rows, *callbacks, ckpt_path=None, compute_dtype="bf16", dropout=0.1, **options):
    """Train six steps; give what the last checkpoint holds."""
    seed_everything(7, verbose=False)
    usual = {"accelerator": ACCELERATOR, "deterministic": True, "enable_checkpointing": True, "val": True}
    usual |= {"max_steps": 6, "accumulate_grad_batches": 3, "ckpt_path": ckpt_path}
    callbacks = [*callbacks, AdapterCheckpoint(every_n_train_steps=1)]
    module = QLoRAModule(str(base), rank=4, compute_dtype=compute_dtype, dropout=dropout)
    fit(module, folder, rows, callbacks=callbacks, **usual | options)
    return read_checkpoint(folder)


def test_a_resumed_run_ends_bit_for_bit_where_one_without_a_stop_ends(base, rows_file, tmp_path):
    whole = train(tmp_path / "whole", base, rows_file)
    with pytest.raises(MachineFailed):
        # at the twelfth batch: those of the first epoch's validation count too
        train(tmp_path / "parts", base, rows_file, Ask(at=19, number=0))
    parts = train(tmp_path / "parts", base, rows_file, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert whole["global_step"] == parts["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(whole[part], parts[part])


def test_inputs_of_layers_in_host_memory_give_the_same_bits(base, rows_file, tmp_path):
    callbacks = GradientCheckpointing(True), GradientCheckpointing(True, offload=True)
    ends = [train(tmp_path / f"{each.offload}", base, rows_file, each) for each in callbacks]
    assert same(ends[0]["state_dict"], ends[1]["state_dict"])


@pytest.mark.parametrize("offload", [False, True])
def test_a_sharded_base_of_one_process_trains_the_same_from_the_host(rows_file, tmp_path, offload):
    (tmp_path / "untied").mkdir()
    base = make_base(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=4)
    whole = train(tmp_path / "whole", base, rows_file)
    sharded = train(tmp_path / "sharded", base, rows_file, strategy=ShardedDDPStrategy(offload=offload))
    torch.distributed.destroy_process_group()
    assert same(whole["state_dict"], sharded["state_dict"])


def test_the_same_seed_draws_the_same_adapters_as_on_a_cpu(base):
    drawn = []
    for device in (DEVICE, "cpu"):
        seed_everything(7)
        module = QLoRAModule(str(base), compute_dtype="fp32", cache=False).to(device)
        module.configure_model()
        drawn.append({name: tensor.detach().cpu() for name, tensor in trainable_tensors(module).items()})
    assert same(*drawn)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU's memory is not planned")
@pytest.mark.parametrize(("checkpointing", "offload"), [(False, False), (True, False), (True, True)])
def test_memory_is_as_planned(rows_file, tmp_path, checkpointing, offload):
    wide = make_base(tmp_path / "wide", **WIDE | {"num_hidden_layers": 8})
    options = [f"--model.base={wide}", f"--data.train={rows_file}", "--data.batch_size=16", "--data.val_fraction=null"]
    options += [f"--trainer.accelerator={ACCELERATOR}", "--trainer.max_epochs=4", "--trainer.log_every_n_steps=1"]
    options += [f"--gradient_checkpointing.enabled={checkpointing}", f"--gradient_checkpointing.offload={offload}"]
    options.append(f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert main(["plan", *options, "--json", str(tmp_path / "plan.json")]) == 0
    assert main(["fit", *options]) == 0
    memory = json.loads((tmp_path / "plan.json").read_text())["memory"]
    _, *peaks = metrics(tmp_path / "run", "memory_peak_gib")  # the first compiles
    measured, planned = max(peaks) * 2**30, memory["peak_bytes"] - memory["parts"]["context"]  # which is not torch's
    buffers = memory["parts"]["buffers"]  # a quarter of so small a base
    assert 0.95 * (planned - buffers) < measured < planned


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_prompts_are_answered_together_as_alone(base, dtype):
    module = make_module(base, compute_dtype=dtype).eval()
    prompts = [make_batch((length,), seed)["input_ids"][0].tolist() for seed, length in enumerate((3, 40, 17, 8))]
    together = module.answer(prompts, [], max_new_tokens=24)
    alone = [module.answer([prompt], [], max_new_tokens=24)[0] for prompt in prompts]
    equal = sum(one == other for one, other in zip(together, alone, strict=True))
    assert equal == len(prompts) if dtype == "fp32" else equal >= len(prompts) - 1  # a tie may fall otherwise


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers warns of what PEFT asks it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_peft_computes_what_the_module_computes(base, tmp_path, dtype):
    name = "fp32" if dtype == torch.float32 else "bf16"
    module = make_module(base, compute_dtype=name).eval()
    module.save_adapter(tmp_path / "adapter")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map={"": DEVICE})
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = make_batch((40,))["input_ids"].to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        expected, found = plain(input_ids=ids).logits, module.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected.to(found), rtol=1e-4 if name == "fp32" else 0.1, atol=1e-2)


@pytest.mark.parametrize("scarce", ["plan", "run"])
def test_a_step_fits_by_itself_on_a_card(tmp_path, capsys, scarce):
    """With memory that others hold, whether that is there at the start or comes in the run, the adapter is the same."""
    output = " ".join(map(str, range(200)))
    long = [{"instruction": f"Count. Row {n}.", "output": output} for n in range(8)]
    base, rows = make_base(tmp_path / "wide", **WIDE), write_rows(tmp_path / "long.jsonl", long)
    options = {"compute_dtype": "fp32", "dropout": 0.0, "batch_size": 8, "accumulate_grad_batches": 1, "max_steps": 2}
    whole = train(tmp_path / "whole", base, rows, **options)
    hog = Hog(at_start=scarce == "plan")
    parts = train(tmp_path / "parts", base, rows, GradientCheckpointing(), hog, **options)
    if scarce == "run" and DEVICE.type == "cuda":
        assert "Memory ran out" in capsys.readouterr().out
    whole, parts = (torch.cat([each.flatten() for each in end["state_dict"].values()]) for end in (whole, parts))
    assert float((parts - whole).norm() / whole.norm()) < 1e-2  # AdamW gives each number the same first step


class Hog(Callback):
    """Leaves a card so little memory that a batch does not fit: from the start, or from the second step on."""

    def __init__(self, at_start):
        self.at_start, self.held = at_start, None

    def setup(self, trainer, pl_module, stage):
        if self.at_start:
            self._hold(400_000_000)

    def on_train_batch_start(self, trainer, *_):
        if DEVICE.type == "cuda" and not self.at_start and self.held is None:
            if trainer.global_step:
                self._hold((torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) // 2)
            torch.cuda.reset_peak_memory_stats()

    def _hold(self, left):
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            self.held = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device=DEVICE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two cards")
@pytest.mark.parametrize("strategy", ["ddp_sharded", "ddp_sharded_offload"])
def test_two_cards_with_a_sharded_base_take_the_same_steps_as_with_whole_ones(rows_file, tmp_path, strategy):
    """The adapters' sums and the gathering of layers are two communicators, in one order on both cards."""
    (tmp_path / "untied").mkdir()
    base = make_base(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=4)
    options = [f"--model.base={base}", f"--data.train={rows_file}", "--trainer.accelerator=gpu", "--trainer.devices=2"]
    options += ["--trainer.max_steps=6", "--data.batch_size=2", "--evaluation=null", "--model.micro_batch_tokens=64"]
    ends = []
    for name in ("ddp", strategy):
        run = [f"--trainer.strategy={name}", f"--trainer.default_root_dir={tmp_path / name}"]
        subprocess.run([sys.executable, "-m", "qlora_lightning", "fit", *options, *run], check=True, timeout=500)
        ends.append(read_checkpoint(tmp_path / name)["state_dict"])
    assert same(*ends)
