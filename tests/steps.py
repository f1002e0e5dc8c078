"""A step of a module whose adapters are random, on a packed batch: its loss and its gradients; and a fit in quiet."""

import itertools

import lightning
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule

LENGTHS = (9, 1, 30, 17, 64, 5)


def trainable_tensors(model):
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def randomize(model, std=0.1, seed=0):
    """Draw the adapters, which begin at zero: the same for each model of a shape."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trainable_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return model


def make_module(base, device="cpu", cls=QLoRAModule, **options):
    """A module whose adapter is drawn, or is that of a folder."""
    usual = {"compute_dtype": "fp32"} if "adapter" in options else {"compute_dtype": "fp32", "rank": 4}
    module = cls(str(base), **usual | options).to(device)
    module.configure_model()
    return module if "adapter" in options else randomize(module)


def make_trainer(folder, **options):
    """A Trainer on one CPU that shows nothing and writes nothing of its own."""
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    usual = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | dict.fromkeys(quiet, False)
    return lightning.Trainer(**(usual | options), default_root_dir=folder)


def fit(module, folder, rows, *, val=False, batch_size=2, ckpt_path=None, **options):
    """Train a module on a file of rows, and validate it on them if asked; give the Trainer."""
    split = {"train": str(rows), "val": str(rows) if val else None}
    trainer = make_trainer(folder, **options)
    data = InstructionDataModule(**split, tokenizer=module.base, batch_size=batch_size)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def make_batch(lengths=LENGTHS, seed=1, vocabulary=250):
    """Random samples in a packed batch; the first token of each has no label."""
    bounds = [0, *itertools.accumulate(lengths)]
    ids = torch.randint(5, vocabulary, (1, bounds[-1]), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, bounds[:-1]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return batch | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def to_device(batch, device):
    return {name: each.to(device) if hasattr(each, "to") else each for name, each in batch.items()}


def loss_and_gradients(module, batch=None):
    """The mean loss, and all gradients of what trains in one vector on the CPU."""
    sums = module.compute_loss(to_device(make_batch() if batch is None else batch, module.device))
    trainable = list(trainable_tensors(module).values())
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(sums.loss_sum * module.loss_scale.value, trainable, **options)
    flat = torch.cat([each.flatten().cpu() for each in gradients]) / module.loss_scale.value
    return float(sums.loss_sum.detach() / sums.count), flat


def distance(one, other):
    return float((one - other).norm() / other.norm())


def assert_same_step(one, other):
    """In float32: to 1e-5 in loss and gradients."""
    assert abs(one[0] - other[0]) <= 1e-5 * abs(other[0])
    assert distance(one[1], other[1]) <= 1e-5
