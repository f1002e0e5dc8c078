"""The LightningModule: a quantized base with its adapters, and the steps that train them."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_lightning.model import answers, guards, sharded
from qlora_lightning.model.activation_checkpointing import GradientCheckpointing
from qlora_lightning.model.adapters import folder as adapter_folder
from qlora_lightning.model.adapters import inject, trained
from qlora_lightning.model.adapters.identity import check_identity, identity_of_data
from qlora_lightning.model.checkpoint import format as checkpoint_format
from qlora_lightning.model.checkpoint.resume import ExactResume
from qlora_lightning.model.layers import attention, select
from qlora_lightning.model.load import build, machine
from qlora_lightning.model.load.base_model import Quantization
from qlora_lightning.model.memory import budget
from qlora_lightning.model.model_types import causal_lm_of, runs_packed
from qlora_lightning.model.self_check import SelfCheck
from qlora_lightning.model.start import RunStart
from qlora_lightning.model.step import accumulate, forward, layout, packed
from qlora_lightning.model.step import loss as losses
from qlora_lightning.model.step import optimizer as optimizers
from qlora_lightning.model.step.validation import ValidationLosses
from qlora_lightning.sources import folders
from qlora_lightning.support import trainer as trainers
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.settings import check_arguments
from qlora_lightning.support.values import check_setting


class QLoRAModule(lightning.LightningModule):
    """A frozen, quantized decoder with LoRA adapters.

    In a subclass, override :meth:`build_model`, :meth:`compute_loss` or :meth:`parameter_groups`.

    A fit runs Lightning's hooks in this order. At its start: ``configure_callbacks``, ``configure_model``,
    ``on_load_checkpoint`` (only on a resume) and ``configure_optimizers``. For each batch:
    ``transfer_batch_to_device``, ``training_step`` and ``backward``. For the last batch of an optimizer step,
    ``optimizer_step`` wraps the last two. In validation: ``validation_step``. What happens at the start and end of a
    run, an epoch or a validation is in the callbacks of ``configure_callbacks``. So an override without ``super()``
    breaks nothing.

    ``training_step`` passes a packed batch, which stays on the host, to the loop in ``step/accumulate.py``. The loop
    cuts the batch (``step/packed.py``) into micro-batches (``step/layout.py``). For each, :meth:`_backpropagate`
    computes the sum of the loss (``step/forward.py``, ``step/loss.py``) and its gradient.

    Logs per optimizer step: ``train_loss`` (nats per labeled token), ``train_perplexity``, ``train_token_accuracy``,
    ``grad_norm`` (before clipping) and, in fp16, ``loss_scale``. Logs per validation: ``val_loss``, ``val_perplexity``
    and ``val_token_accuracy``; ``test_…`` likewise. If you override ``compute_loss``, its own ``metrics`` replace
    perplexity and accuracy.

    Args:
        base: Hub id, folder, ``.gguf`` file, or ``package:NAME`` (a GGUF inside an installed Python package).
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python code that comes with the base.
        quantization: Format of the base's linear layers: ``nf4``, ``fp4``, ``int8`` or ``none``.
        double_quant: Also quantize the 4-bit scales, which saves 0.4 bits per weight.
        compute_dtype: Dtype of the computation; ``auto`` is bf16 if the hardware supports it, else fp16 on CUDA (fp32
            for families that overflow, such as Gemma and Qwen) and fp32 on a CPU.
        cache: Cache the quantized base for the next start.
        rank: Rank of the update: rows of A, columns of B. Start at 8, and double it as long as the loss improves.
        alpha: Scale of the update; ``None`` means 2 × rank. PEFT computes ``alpha / rank · B A x``, or
            ``alpha / sqrt(rank) · B A x`` with rsLoRA. So at a fixed alpha, a larger rank has a weaker effect.
        dropout: Dropout probability of A's inputs.
        target_modules: Modules to adapt: ``all-linear``, ``attention``, ``mlp``, a list of names, or a regular
            expression.
        layers: Decoder layers to adapt: ``all``, ``last:N`` or a list of indices.
        target_experts: In a mixture-of-experts base, also adapt the experts of these layers, as PEFT's
            ``target_parameters``. Plain PEFT opens such an adapter, but not every inference server does.
        lora_options: More arguments of ``peft.LoraConfig``, from those verified on a quantized base: ``use_rslora``,
            ``use_dora``, ``init_lora_weights`` (random ones), ``rank_pattern``, ``alpha_pattern``,
            ``modules_to_save``, ``trainable_token_indices``, ``ensure_weight_tying``.
        adapter: Adapter folder, or run folder with one, to train further; its own rank, alpha and targets apply, and
            other values are rejected.
        learning_rate: Peak learning rate; ``auto`` chooses it by the base's width, such as 2e-4 for 8B, and a tenth
            of that for preferences.
        optimizer: Class path, or ``class_path`` and ``init_args`` without ``lr``; ``None`` means torch's fused AdamW.
        weight_decay: Weight decay of all adapters.
        schedule: Learning-rate schedule of ``transformers.get_scheduler``: a name, or ``{name: …, its arguments}``.
        warmup: Warmup of the learning rate: a share of the optimizer steps, or a number of steps, such as 100.
        loraplus_ratio: Ratio of B's learning rate to A's (LoRA+, Hayou et al. 2024), such as 16; ``None`` means 1.
        neftune_alpha: Strength of the noise on embeddings in training (NEFTune, Jain et al. 2023), such as 5; ``None``
            adds no noise.
        fast: Use our fused layers, attention and loss; ``False`` uses the plain ones of PEFT, transformers and torch,
            and computes all tokens.
        micro_batch_tokens: Maximum number of tokens in a micro-batch, which holds whole rows; a single row may have
            more. It changes memory and speed. The result changes only by rounding and by what dropout draws. ``auto``
            starts with what the memory formula says fits into free memory, or with 8,192 on a CPU. When memory runs
            out, the number falls by a fifth.

    Attributes:
        model: The base with its adapter; ``None`` before ``configure_model``. Use its ``disable_adapter()`` and
            ``set_adapter(name)`` to choose which adapter computes losses and generates.
        identity: What the adapter belongs to: the base's name, fingerprint and quantization, its own shape.
        window: The accumulation window in progress.
        loss_scale: The factor of the loss in backward.
        sharded_base: What the base becomes under ``trainer.strategy: ddp_sharded``, else ``None``.
        precision: In which dtypes the model computes.
        pairs: Whether the module learns from preferences, as :class:`PreferenceModule` does.
        accuracy: Name of the metric that is the share of right rows or tokens.
        own_names: Attributes of this class; a subclass has more.
    """

    pairs = False
    accuracy = "token_accuracy"

    def __init__(
        self,
        base: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization: Quantization = "nf4",
        double_quant: bool = True,
        compute_dtype: machine.ComputeDtype = "auto",
        cache: bool = True,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        layers: str | list[int] = "all",
        target_experts: bool = False,
        lora_options: dict[str, Any] | None = None,
        adapter: str | None = None,
        learning_rate: optimizers.LearningRate = "auto",
        optimizer: str | dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        schedule: str | dict[str, Any] = "cosine",
        warmup: int | float = 0.03,
        loraplus_ratio: float | None = None,
        neftune_alpha: float | None = None,
        fast: bool = True,
        micro_batch_tokens: budget.MicroBatchTokens = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # for loggers and load_from_checkpoint; see ExactResume
        self.base, self.revision, self.trust_remote_code, self.cache = base, revision, trust_remote_code, cache
        self.quantization, self.double_quant, self.compute_dtype = quantization, double_quant, compute_dtype
        self.adapter_options: dict[str, Any] = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "layers": layers,
            "target_experts": target_experts,
            "lora_options": lora_options,
        }
        self.learning_rate: Any = learning_rate  # a number after configure_model
        self.weight_decay, self.optimizer_config = weight_decay, optimizer
        self.schedule, self.warmup = schedule, warmup
        self.loraplus_ratio, self.neftune_alpha = loraplus_ratio, neftune_alpha
        # checked here, since they are used only after minutes of loading
        check_arguments("model", QLoRAModule.__init__, locals())
        inject.check_options(lora_options)
        optimizers.check_optimizer(optimizer, learning_rate, weight_decay)
        optimizers.check_schedule(schedule, learning_rate, warmup)
        self.adapter, self.fast = adapter, fast
        self.model: Any = None
        self.identity: dict[str, Any] = {"base": base, "quantization": quantization}
        self.precision = select.Precision()
        self.is_stochastic = True
        self.window, self.loss_scale = accumulate.Window(), accumulate.LossScale()
        self.token_budget = budget.TokenBudget(micro_batch_tokens)
        self.guard = guards.TrainingGuard()
        self.statistics = losses.TokenStatistics()
        self._computes_loss = False
        self._filled: set[str] | None = set()  # of fill_own_tensors; None: it has been called for the last time
        self.sharded_base: sharded.ShardedBase | None = None
        self.own_names = frozenset({*vars(self), "own_names"})

    def configure_callbacks(self) -> list[lightning.Callback]:
        guards.check_callbacks(trainers.trainer_of(self))
        trainer = trainers.trainer_of(self)
        ours = [ExactResume(), RunStart(), self.guard, SelfCheck(), self.token_budget, build.ModelReport()]
        ours += [self.window, ValidationLosses()]
        has_own = trainer is not None and trainers.find_callback(trainer, GradientCheckpointing) is not None
        return ours if has_own else [*ours, GradientCheckpointing()]

    # ---- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Make the model once, on the device of this process."""
        guards.check_start(self)
        trainer = trainers.trainer_of(self)
        if self.adapter is not None and (trainer is None or trainer.state.fn == TrainerFn.FITTING):
            self._take_settings_of_adapter()
        if self.model is not None:
            return
        self.model = self.build_model()
        if self.overrides("build_model"):
            self.model = build.complete_model(self.model, self.identity, self.adapter, self.adapter_options, self.fast)
        self.fill_own_tensors(is_last=not self.overrides("configure_model"))
        self.model.train()  # Hugging Face models come in eval()
        width = self.causal_lm.config.hidden_size
        self.learning_rate = optimizers.choose_learning_rate(self.learning_rate, width, self.pairs)
        self._choose_precision()
        # DDP would broadcast the whole base, which every rank has loaded; it has no public setting against that.
        saved, frozen = inject.saved_tensors(self), tuple(f"{name}." for name in ("model", *inject.frozen_models(self)))
        tensors = [*self.named_parameters(), *self.named_buffers()]
        ignored = [name for name, _ in tensors if name.startswith(frozen) and name not in saved]
        self._ddp_params_and_buffers_to_ignore = ignored

    def fill_own_tensors(self, is_last: bool = True) -> None:
        """Set what a subclass has beside its model to what the folder ``adapter`` has of it, each tensor once.

        It is called when the model is made, and again when a run starts, for what an override of ``configure_model``
        adds. The ``is_last`` time what either of them lacks is told. A checkpoint has all of it: a resume skips this.
        """
        trainer = trainers.trainer_of(self)
        is_resume = trainer is not None and trainer.ckpt_path is not None
        if self.adapter is not None and self._filled is not None and not is_resume:
            folder = folders.find_adapter_folder(self.adapter)
            self._filled |= adapter_folder.fill_own_tensors(self, folder, self._filled, is_last)
        if is_last:
            self._filled = None

    def _take_settings_of_adapter(self) -> None:
        """Let settings, and what is recorded of them, be those of the folder ``adapter``: these train.

        Not in an evaluation, whose settings may be those of another run.
        """
        settings = build.settings_of_adapter(self)
        changed = {name: value for name, value in settings.items() if value != self.adapter_options.get(name)}
        self.adapter_options |= changed
        if recorded := {name: value for name, value in changed.items() if name in self.hparams}:
            self.save_hyperparameters(recorded, logger=self._log_hyperparams)

    def build_model(self) -> nn.Module:
        """Load the base and put adapters on it. Override it for another base or other adapters.

        If ``adapter`` names a folder, its tensors are put into what an override returns, which must fit them.

        Returns:
            A model of PEFT around a causal language model of transformers, in which only adapters require gradients. An
            override may return the model of transformers alone: it gets the adapters that the settings describe.
        """
        trainer, model_type = trainers.trainer_of(self), None
        device = self.device if trainer is None else trainer.strategy.root_device
        is_sharded = trainer is not None and isinstance(trainer.strategy, sharded.ShardedDDPStrategy)
        if self.compute_dtype == "auto" and device.type == "cuda":
            source = folders.open_base(self.base, self.revision, weights=False)
            model_type = folders.read_config(source.folder, source.name).get("model_type")
        model, self.identity = build.assemble_model(
            name=self.base,
            device=torch.device("cpu") if is_sharded else device,
            compute_dtype=machine.choose_compute_dtype(self.compute_dtype, device, model_type),
            quantization=self.quantization,
            double_quant=self.double_quant,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            cache=self.cache,
            adapter=self.adapter,
            adapter_options=self.adapter_options,
            fast=self.fast,
        )
        return model

    def overrides(self, name: str) -> bool:
        """Whether a subclass, or this object, replaces a method of QLoRAModule."""
        return name in vars(self) or getattr(type(self), name) is not getattr(QLoRAModule, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = tensor if isinstance(tensor, DTensor) else fn(tensor)  # shards stay where they are
            if moved.dtype != tensor.dtype:  # before any tensor has changed
                raise UserError(
                    f"{type(self).__name__} cannot be cast to {moved.dtype}. {inject.KEEPS_DTYPES}", "adapter.dtype"
                )
            return moved

        module: Self = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return module

    @property
    def causal_lm(self) -> Any:
        """The model of transformers inside PEFT's wrapper."""
        return causal_lm_of(self.model)

    def autocast(self, whole: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Compute in the compute dtype what PEFT's own layers would compute in float32.

        ``whole``: for transformers' own forward, which calls embedding and head too; they are in float32 if they train.
        """
        return self.precision.autocast(self.device, whole)

    def choose_layers(self) -> select.Fusion:
        """Choose which layers run fused. Call it after changing or hooking parts of the model."""
        self.is_stochastic = attention.is_stochastic(self.causal_lm)
        return select.choose_layers(self.causal_lm)

    def use_plain_path(self) -> None:
        """Train as with ``fast: false`` from now on; the adapters stay. The settings are not changed."""
        select.distrust(self.model)
        self.fast = False
        self._choose_precision()

    def _choose_precision(self) -> None:
        """Choose the precision now: inside evaluations PEFT switches off what trains."""
        dtype = getattr(torch, self.identity.get("compute_dtype", "float32"))
        self.precision = select.choose_precision(self.causal_lm, self.choose_layers(), dtype)
        self.loss_scale.is_used = dtype == torch.float16

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: Any) -> losses.LossSums:
        """Sum the loss over a micro-batch. Override it for another objective; return sums, not means.

        Args:
            batch: A :class:`~qlora_lightning.model.step.layout.MicroBatch` of a packed batch. An override gets a batch
                of another kind as the data module made it, whole and on the device, such as a padded one, with
                ``input_ids``, ``attention_mask`` and ``labels``, ``(rows, tokens)``. Under Fabric it may be a packed
                batch, with ``input_ids``, ``position_ids``, ``labels`` ``(1, tokens)`` and ``cu_seqlens``
                ``(samples + 1,)``. :meth:`token_losses` and :meth:`last_states` take all of them.
        """
        nll, correct = self.token_losses(batch)
        return losses.LossSums.of(nll, token_accuracy=correct, nll=nll)

    def token_losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss of each labeled token of a micro-batch, ``(K,)``, and whether it is the most likely one.

        They are in the order of the samples, ``counts`` of each.
        """
        hidden, targets = self.last_states(batch)
        with self.autocast():
            return losses.token_losses(hidden, targets, losses.lm_head_of(self.causal_lm), fused=self.fast)

    def last_states(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the hidden states that predict the labeled tokens, ``(K, width)``, and these tokens, ``(K,)``.

        Only tokens that a label of this batch needs are computed: hooks on the model see fewer tokens than the batch
        has. States are in the order of the samples.
        """
        micro_batch = self.micro_batch_of(batch)
        # a pass without gradients in a training step is that of a teacher or a reference: it has no dropout or noise
        is_teacher = self.training and not torch.is_grad_enabled()
        with self.autocast(), forward.evaluation_mode(self) if is_teacher else contextlib.nullcontext():
            noise_alpha = self.neftune_alpha if self.training else None
            hidden = forward.compute_states(self.causal_lm, micro_batch, noise_alpha, fused=self.fast)
        return hidden, micro_batch.targets

    def micro_batch_of(self, batch: Any) -> layout.MicroBatch:
        """Lay a packed or padded batch out as one micro-batch, on the device; a micro-batch is itself.

        Raises:
            UserError: A token is not one of the base's, or a row is too long for its rotary embedding.
        """
        if isinstance(batch, layout.MicroBatch):
            return batch
        return self.cutter.lay_out(packed.pack_padded(batch, only_known=not self.overrides("compute_loss")))

    @property
    def cutter(self) -> packed.Cutter:
        """What cuts packed batches and makes micro-batches, in the current mode, of training or evaluation."""
        causal_lm = self.causal_lm
        # not if each token draws its own random numbers, for noise or for dropout
        draws = (self.training and self.neftune_alpha is not None) or (causal_lm.training and self.is_stochastic)
        return packed.Cutter(
            causal_lm=causal_lm,
            device=self.device,
            budget=self.token_budget,
            sharded_base=self.sharded_base,
            skips_unlabelled=self.fast and runs_packed(causal_lm.config) and not draws,
            locate=self.locate_rows,
        )

    def prepare_batch(self, batch: Any) -> Any:
        """Return a batch, before it is cut, with what all of its micro-batches need."""
        return batch

    def locate_rows(self, row_ids: Sequence[int]) -> str:
        """Describe for a message where rows of the current pass are from."""
        data, split = trainers.split_of_pass(self)
        return packed.format_locations(packed.row_locations(data, row_ids, split))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Pack a padded batch, and leave a packed one on the host, which cuts it; its micro-batches move."""
        batch = self.pack_batch(batch)
        return batch if packed.is_packed(batch) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def pack_batch(self, batch: Any) -> Any:
        """Pack a padded batch, unless :meth:`compute_loss` is overridden, which gets it as it is."""
        return batch if self.overrides("compute_loss") else packed.pack_padded(batch)

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the gradients of a batch's *sums*; optimizer_step turns them into the mean's."""
        if self.guard.checks_due or not self.causal_lm.training:
            guards.check_training_mode(self.model)
            self.choose_layers()  # a callback may have hooked or changed parts
        batch = self.prepare_batch(batch)
        return self.window.accumulate(batch, self.cutter, self._backpropagate, self.zero_grad)

    def _backpropagate(self, micro_batch: Any) -> losses.LossSums:
        sums = self.sum_loss(micro_batch)
        if not sums.loss_sum.requires_grad:
            raise UserError(
                f"The loss_sum that compute_loss of {type(self).__name__} returned has no gradient, as of a detached "
                "tensor or a number: expected a sum that depends on the adapters.",
                "loss.gradient",
            )
        (sums.loss_sum * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]
        return sums.detach()  # the graph has casts of the adapters

    def sum_loss(self, micro_batch: Any) -> losses.LossSums:
        """Call :meth:`compute_loss`, of a subclass too, and check what it returns."""
        self._computes_loss = True
        try:
            sums: Any = self.compute_loss(micro_batch)
        finally:
            self._computes_loss = False
        if not isinstance(sums, losses.LossSums):
            raise UserError(
                f"compute_loss of {type(self).__name__} returned {type(sums).__name__}: expected LossSums. "
                "`LossSums.of(losses)` makes them of the loss of each token, a tensor of one dimension.",
                "loss.type",
            )
        return sums

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # the mean of training_step does not: its gradients are computed already
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Keep the gradients: Lightning calls this after the training_step that has computed them."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Divide the gradients of the sum as soon as they are complete, before any ``on_before_optimizer_step``.

        Raises:
            UserError: The optimizer needs the loss of its step several times, and that is of several batches.
        """
        calls = itertools.count()

        def closure() -> Any:
            if next(calls) and self.trainer.accumulate_grad_batches > 1:
                raise UserError(
                    f"{type(optimizer).__name__} computes the loss several times a step: set "
                    "trainer.accumulate_grad_batches to 1, or choose another model.optimizer.",
                    "model.optimizer",
                )
            loss = None if optimizer_closure is None else optimizer_closure()
            self._finish_window(optimizer)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _finish_window(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the window's gradients into those of its mean loss over all ranks, check and log them."""
        means, self.window.totals = accumulate.to_host(
            *self.window.divide_gradients(
                [parameter for group in optimizer.param_groups for parameter in group["params"]],
                factor=1 / self.loss_scale.value,
                over_ranks=self.trainer.world_size > 1,
            )
        )
        is_finite = means["grad_norm"].isfinite()
        if means["loss"].isfinite() and self.loss_scale.skips_step(self.global_step, bool(is_finite)):
            optimizer.zero_grad()  # torch's optimizers change nothing that has no gradient
            del means["grad_norm"]
        self.guard.check_step(self, optimizer, means, self.window.totals)
        step = {
            "learning_rate": torch.tensor(optimizer.param_groups[0]["lr"]),
            "micro_batches": torch.tensor(float(self.window.micro_batches)),
        }
        if "grad_norm" in means:  # a skipped step has none
            step["grad_norm"] = means.pop("grad_norm")
        if self.loss_scale.is_used:
            step["loss_scale"] = torch.tensor(self.loss_scale.value)
        self.log_means("train", means)
        self.log_dict(step)
        self.window.clear()

    # ---- validation and test -----------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self.statistics.fault:
            return
        try:
            for sums in accumulate.evaluate(self.prepare_batch(batch), self.cutter, self.sum_loss):
                self.statistics.update(sums)
        except budget.RowDoesNotFit as error:  # not worth losing what was trained since the last checkpoint
            if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
                raise
            self.statistics.fault = str(error)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        QLoRAModule.validation_step(self, batch, batch_idx)  # not the one of a subclass

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value, as Lightning does; not in :meth:`compute_loss`, of which memory decides how often it is called.

        Raises:
            UserError: It is called in there.
        """
        if self._computes_loss:
            raise UserError(
                f"compute_loss logs {name}, whose value would depend on how memory cuts a batch: return its sum over "
                f"the tokens in LossSums.metrics, such as `LossSums.of(losses, {name}=values)`.",
                "loss.log",
            )
        super().log(name, value, *args, **kwargs)

    def log_means(self, split: str, means: dict[str, Tensor], sync_dist: bool = False) -> None:
        """Log the mean loss and the means of metrics, under the name of a split; that of ``nll`` as a perplexity."""
        if (nll := means.pop("nll", None)) is not None:
            means["perplexity"] = nll.exp()
        self.log(f"{split}_loss", means.pop("loss").float(), prog_bar=True, sync_dist=sync_dist)
        self.log_dict({f"{split}_{name}": mean.float() for name, mean in means.items()}, sync_dist=sync_dist)

    # ---- optimization ----------------------------------------------------------------------------------------------

    def parameter_groups(self) -> optimizers.ParameterGroups:
        """Return the optimizer's parameter groups. Override it for other learning rates per group."""
        return optimizers.group_parameters(self, self.learning_rate, self.weight_decay, self.loraplus_ratio)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        choice = self.optimizer_config, self.learning_rate, self.weight_decay
        optimizer_class, arguments = optimizers.choose_optimizer(*choice)
        optimizer = optimizer_class(self.parameter_groups(), **arguments)  # groups keep their own rates
        steps = trainers.check_steps(self.trainer, optimizers.needs_end(self.schedule, self.warmup))
        schedule = optimizers.build_schedule(optimizer, self.schedule, steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- answers -----------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, folder: Path) -> None:
        """Put the adapter of a folder beside the model's own, to evaluate and to answer with."""
        adapter_folder.add_named_adapter(self.model, name, folder, self.identity, self.fast)
        self._choose_precision()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[list[int]]:
        """Answer each prompt of a prediction batch greedily, up to its ``max_new_tokens``; return token ids."""
        prompts = [prompt.ids for prompt in batch["prompts"]]
        return self.answer(prompts, batch["stop_ids"], batch["max_new_tokens"])

    def answer(
        self, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int = 128, **options: Any
    ) -> list[list[int]]:
        """Continue each prompt (token ids) greedily until a stop token; return token ids without it.

        Options are more arguments of :func:`~qlora_lightning.model.answers.generate_answers`.
        """
        self.choose_layers()
        with sharded.collective_passes(self), self.autocast(whole=True):
            return answers.generate_answers(
                self.causal_lm, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **options
            )

    # ---- what it saves and loads -------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.model is not None:
            raise UserError(
                f"{type(self).__name__} is not pickled, as by torch.save(module): the file would hold the whole base, "
                "and run code when it is loaded. Use module.save_adapter(folder), trainer.save_checkpoint(file) or "
                "torch.save(module.state_dict(), file).",
                "module.pickle",
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:  # else it would take __reduce_ex__
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return copied

    def save_adapter(self, folder: str | Path, tokenizer: Any = None, stop_ids: Sequence[int] = ()) -> None:
        """Write the adapter folder: PEFT's files, the tokenizer with its chat template, and what it belongs to.

        What a subclass trains beside its model is in ``extra.safetensors``. At ``stop_ids`` generation stops, beside
        the tokenizer's end and the base's own.
        """
        data = identity_of_data(trainers.trainer_of(self))
        identity = {**self.identity, "data": data} if data else self.identity
        extra = inject.own_tensors(self)
        adapter_folder.save_adapter_folder(Path(folder), self.model, tokenizer, identity, stop_ids, extra)

    def state_dict(  # type: ignore[override]  # torch's overloads, in one signature
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the adapter's tensors, and a subclass's own; the frozen base is loaded again by its name."""
        destination = {} if destination is None else destination
        for name, tensor in inject.saved_tensors(self).items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Set what :meth:`state_dict` returns; always strict: names and shapes must be exactly the same."""
        self.configure_model()
        inject.copy_tensors(self, state_dict, "The checkpoint")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # before tensors are set: another base or rank is a clearer error than shapes that do not fit
        identity = checkpoint_format.read_content(checkpoint, "The checkpoint")["identity"]
        check_identity(identity, self.identity, "The checkpoint")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # our settings are under our own key, and no hparams file exists
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Make a module from a checkpoint: settings, base and adapter, on the device ``map_location``.

        ``overrides`` replace saved arguments. Whether code that comes with the base may run is not taken from the
        checkpoint: pass ``trust_remote_code``. The other arguments are Lightning's, and can only be left as they are:
        names and shapes must be those of the model, and no pickle is read.
        """
        expected = "None: the checkpoint has the settings, and arguments by name replace them"
        check_setting("hparams_file", hparams_file, hparams_file is None, expected)
        check_setting("strict", strict, strict is not False, "True: a checkpoint has all that trains, and nothing else")
        check_setting("weights_only", weights_only, weights_only is not False, "True: no code of a file is run")
        module: Self = checkpoint_format.restore_module(cls, checkpoint_path, map_location, overrides)
        return module

    @classmethod
    def from_run(cls, folder: str | Path, base: str | None = None, **settings: Any) -> Self:
        """Make a module with the trained adapter of a run folder, or of an adapter folder, on its base as in training.

        It is on a CUDA device if there is one, and in evaluation mode: ``module.train()`` before you train it further.

        Args:
            folder: The run folder, or the adapter folder.
            base: The base, if it is no longer found under the name it was trained under.
            settings: Arguments of the class that are not at their defaults, such as ``learning_rate``. Base, its
                quantization and the adapter's shape are those of the folder.
        """
        makes_base = cls.build_model is not QLoRAModule.build_model
        return trained.open_run(folder, cls, makes_base, base, **settings)
