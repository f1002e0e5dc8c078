"""The LightningModule: a quantized base with its adapters, and the steps that train them."""

from typing import Any, cast

import torch
from lightning import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.model.adapters.lora import check_adapter_settings, trainable_tensors
from qlora_lightning.model.adapters.reading import fill_adapter
from qlora_lightning.model.adapters.targets import check_layers
from qlora_lightning.model.base_model import Quantization
from qlora_lightning.model.build import assemble_model
from qlora_lightning.model.checkpoint.resume import ExactResume
from qlora_lightning.model.device import (
    ComputeDtype,
    QuietCollector,
    choose_compute_dtype,
    explain_dtype,
    give_back_freed_memory,
    keep_freed_memory,
)
from qlora_lightning.model.guards.checks import check_callbacks, check_trainer, check_training_mode
from qlora_lightning.model.guards.guard import OnNonfinite, TrainingGuard
from qlora_lightning.model.judging import JudgingModule
from qlora_lightning.model.layers.attention import attends_flatly, register_flat_attention
from qlora_lightning.model.layers.elementwise import check_row_length
from qlora_lightning.model.layers.plain_path import explain_plain_layers
from qlora_lightning.model.loss import mean_with_gradient_of_sum
from qlora_lightning.model.memory.out_of_memory import telling_out_of_memory
from qlora_lightning.model.neftune import check_neftune_alpha
from qlora_lightning.model.optimizer import (
    ParameterGroups,
    build_optimizer,
    build_schedule,
    check_loraplus_ratio,
    check_optimizer,
    check_schedule,
    describe_few_steps,
    group_parameters,
    plan_steps,
)
from qlora_lightning.model.summary import adapter_table, describe_large_rank, describe_sizes
from qlora_lightning.model.window import GradientBuckets
from qlora_lightning.support.console import describe
from qlora_lightning.support.imports import without_garbage_collection
from qlora_lightning.support.trainer import callbacks_of


class QLoRAModule(JudgingModule):
    """A frozen, quantized LLaMA with LoRA adapters.

    Doors for subclasses: :meth:`build_model`, :meth:`compute_loss` and :meth:`parameter_groups`.

    Logs ``train_loss`` (nats per labelled token of the optimizer step) and ``grad_norm`` (before clipping) per
    optimizer step, under ``on_nonfinite: skip`` also ``skipped_steps``; ``val_loss``, ``val_perplexity`` and
    ``val_token_accuracy`` per validation, ``test_…`` likewise.

    Args:
        base: Hub id, folder, ``.gguf`` file, or ``package:NAME`` (a GGUF inside an installed Python package).
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Let Python code that comes with the base run.
        quantization: How the base's linears are stored.
        double_quant: Quantize the 4-bit scales too: 0.4 bits less per weight.
        compute_dtype: Dtype of the products; ``auto`` is bf16 where the hardware has it, else fp16 on CUDA and fp32
            on a CPU.
        cache: Keep the quantized base for the next start.
        rank: Rank of the update: rows of A, columns of B. Start at 8; double it while that pays.
        alpha: Multiplier of the update; ``None`` means 2 × rank. PEFT computes ``alpha / rank · B A x``, with rsLoRA
            ``alpha / sqrt(rank) · B A x``: at a fixed alpha a larger rank acts weaker.
        dropout: Probability with which inputs of A are dropped in training.
        target_modules: ``all-linear``, ``attention``, ``mlp``, a list of names, or a regular expression.
        layers: ``all``, ``last:N`` or a list of layer indices.
        lora_options: More for ``peft.LoraConfig``: ``use_rslora``, ``use_dora``, ``init_lora_weights``, …
        adapter: Adapter folder, or run folder with one, to go on training; its own rank, alpha and targets rule.
        learning_rate: Peak learning rate.
        optimizer: Class path, or class_path and init_args without lr; ``None``: torch's AdamW, fused.
        weight_decay: Of all adapters.
        schedule: Name of a schedule of ``transformers.get_scheduler``, or ``{name: …, its arguments}``.
        warmup_ratio: Share of the optimizer steps over which the learning rate rises.
        loraplus_ratio: How many times as fast B learns as A (LoRA+, Hayou et al. 2024), as 16; ``None``: as fast.
        neftune_alpha: Of noise on the embeddings in training (NEFTune, Jain et al. 2023), as 5; ``None``: no noise.
        fast: ``False`` takes every plain path of PEFT, transformers and torch instead of ours: layers, attention, the
            head's loss, the inputs of checkpointed layers; all tokens are computed, and no batch is filled up. What
            computes nothing of a step stays: flat batches, logits of some labelled tokens at a time, freed memory that
            is kept for the next step, the collector's rest. So does the cache against which answers are generated.
        on_nonfinite: What to do when a loss or gradient is NaN or infinite: ``stop`` the run, or ``skip`` the step,
            which then moves nothing and counts as a step of the schedule. See :class:`TrainingGuard`.
    """

    def __init__(
        self,
        base: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization: Quantization = "nf4",
        double_quant: bool = True,
        compute_dtype: ComputeDtype = "auto",
        cache: bool = True,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        layers: str | list[int] = "all",
        lora_options: dict[str, Any] | None = None,
        adapter: str | None = None,
        learning_rate: float = 2e-4,
        optimizer: str | dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        schedule: str | dict[str, Any] = "cosine",
        warmup_ratio: float = 0.03,
        loraplus_ratio: float | None = None,
        neftune_alpha: float | None = None,
        fast: bool = True,
        on_nonfinite: OnNonfinite = "stop",
    ) -> None:
        super().__init__()
        check_adapter_settings(rank, alpha, dropout)  # here, and not only where they are used: after minutes of loading
        check_layers(layers)
        check_optimizer(optimizer, learning_rate, weight_decay)
        check_schedule(schedule, warmup_ratio)
        check_loraplus_ratio(loraplus_ratio)
        check_neftune_alpha(neftune_alpha)
        self.save_hyperparameters(logger=False)  # for load_from_checkpoint; see ExactResume
        self.base, self.revision, self.trust_remote_code = base, revision, trust_remote_code
        self.quantization, self.double_quant, self.cache = quantization, double_quant, cache
        self.compute_dtype, self.fast = compute_dtype, fast
        self.adapter_options: dict[str, Any] = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "layers": layers,
            "lora_options": lora_options,
        }
        self.adapter = adapter
        self.learning_rate, self.weight_decay, self.optimizer_choice = learning_rate, weight_decay, optimizer
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.loraplus_ratio, self.neftune_alpha = loraplus_ratio, neftune_alpha
        self.guard = TrainingGuard(on_nonfinite)
        self.identity = {"base": base, "quantization": quantization}

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), self.guard, GradientBuckets(), QuietCollector()]

    # ---- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Make the model once, on the device of this process."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(callbacks_of(self.trainer), ExactResume, TrainingGuard)
        self._undo_compile()
        if self.model is not None:
            return
        if self._trainer is not None:
            strategy = type(self.trainer.strategy).__name__
            check_trainer(str(self.trainer.precision), strategy, self.quantization)
        with without_garbage_collection():  # loading imports much, and makes many objects that stay
            self.model = self.build_model()
            self._undo_compile()
            if not attends_flatly(self.causal_lm):  # an override has loaded it otherwise
                self.causal_lm.set_attn_implementation(register_flat_attention(self.fast))
            if self.adapter is not None and self.overrides("build_model"):
                fill_adapter(self.model, find_adapter_folder(self.adapter))  # it need not have read self.adapter
        self.model.train()  # Hugging Face models come in eval()
        if self._device_of_process().type == "cpu":
            keep_freed_memory()
        # DDP would send the whole base to every rank, which has it already, mapped from a file.
        trainable = trainable_tensors(self)
        named = [*self.named_parameters(), *self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in named if name not in trainable]

    def build_model(self) -> nn.Module:
        """Load the base and put adapters on it. Override it for another base or other adapters.

        Where ``adapter`` names a folder, its tensors are put into what an override returns, which must fit them.

        Returns:
            A causal language model of transformers, or of PEFT around one, in which only adapters require gradients.
        """
        device = self._device_of_process()
        dtype = choose_compute_dtype(self.compute_dtype, device)
        made = assemble_model(
            self.base,
            device=device,
            compute_dtype=dtype,
            quantization=self.quantization,
            double_quant=self.double_quant,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            cache=self.cache,
            adapter=self.adapter,
            adapter_options=self.adapter_options,
            fast=self.fast,
            check_later=self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING,
        )
        self.identity, self._base_check = made.identity, made.check
        if made.unfused and dtype != torch.float32:
            self.autocast_dtype = dtype  # PEFT's own layers would compute the fp32 adapters in fp32
        return cast(nn.Module, made.model)

    def _undo_compile(self) -> None:
        """Take ``torch.compile`` off what it cannot compile, and report it.

        It breaks the backward of the fused layers. A compiled ``self.model`` would never be called: the loss calls the
        decoder inside it.
        """
        inner = getattr(self.model, "_orig_mod", None)
        if inner is not None:
            self.model, why = inner, "the loss does not call module.model, but the decoder inside it"
        elif self.fast and self._compiler_ctx is not None:
            to_uncompiled(self)
            why = "the layers are fused already"
        else:
            return
        if self.global_rank == 0:
            describe(
                f"torch.compile is switched off: {why}. To compile the plain layers of PEFT and transformers, set "
                "model.fast to false and compile the module itself: trainer.fit(torch.compile(module), …)."
            )

    def overrides(self, name: str) -> bool:
        """Whether a method is other than QLoRAModule's: what follows from how that works does not hold then."""
        return name in vars(self) or getattr(type(self), name) is not getattr(QLoRAModule, name)

    def _device_of_process(self) -> torch.device:
        return self.device if self._trainer is None else self.trainer.strategy.root_device

    def on_fit_end(self) -> None:
        give_back_freed_memory()

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Give a loss with the gradient of a *sum*; on_before_optimizer_step turns sums into the mean."""
        if self.guard.checks_due:
            check_training_mode(self.model)
        with telling_out_of_memory(self, batch):
            sums = self.compute_loss(batch)
        self.window.add(sums, self.trainer.accumulate_grad_batches, batch.get("row_ids"), batch)
        return mean_with_gradient_of_sum(sums)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with telling_out_of_memory(self, next(reversed(self.window.batches), None)):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with telling_out_of_memory(self, None):  # its state is made at the first step
            super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loss = self.window.divide_gradients(
            trainable,
            divided_by=self.trainer.accumulate_grad_batches * self.trainer.world_size,
            reduce_sum=lambda sums: cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum")),
        )
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        self.guard.judge_step(self, optimizer, loss, norm)
        self.log_dict({"train_loss": loss}, prog_bar=True)
        self.log_dict({"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]})
        if self.guard.on_nonfinite == "skip":
            self.log_dict({"skipped_steps": float(self.guard.skipped_steps)})
        self.window.clear()

    # ---- optimization ----------------------------------------------------------------------------------------------

    def parameter_groups(self) -> ParameterGroups:
        """Give the optimizer's parameter groups. Override it for other learning rates per group."""
        return group_parameters(trainable_tensors(self), self.learning_rate, self.loraplus_ratio)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(
            self.parameter_groups(),
            self.optimizer_choice,
            self.learning_rate,
            self.weight_decay,
            fused=not str(self.trainer.precision).endswith("-mixed"),  # there Lightning clips no fused optimizer
        )
        total_steps = plan_steps(self.trainer)
        few = describe_few_steps(self.trainer, total_steps)
        if few is not None and self.trainer.is_global_zero:
            describe(few)
        schedule = build_schedule(optimizer, self.schedule, total_steps, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._undo_compile()  # of what an override of configure_model has compiled
        data = getattr(self.trainer, "datamodule", None)
        check_row_length(self.causal_lm.config, getattr(data, "max_length", 0))  # not first at a row
        self._describe_fit()

    @rank_zero_only
    def _describe_fit(self) -> None:
        slow = explain_dtype(self.compute_dtype, self.device)
        if slow is not None:
            describe(slow)
        describe(adapter_table(self.model))
        describe(describe_sizes(self.model))
        large = describe_large_rank(self.model)
        if large is not None:
            describe(large)
        if self.fast:
            plain = explain_plain_layers(
                self.causal_lm, autocasts=self.autocast_dtype is not None, precision=str(self.trainer.precision)
            )
            if plain is not None:
                describe(plain)
