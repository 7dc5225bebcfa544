"""Where this process stands among its peers, and the few collectives of the loop; accelerate is only here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmalign.copies import forgetting

if TYPE_CHECKING:
    from collections.abc import Iterable


class Distributed:
    """One process of the run: alone, or one of several under DDP, FSDP or DeepSpeed, as the launcher says.

    Precision is the policy's business and accumulation the trainer's, so accelerate is asked for neither.
    device: "cpu" keeps to the CPU, None takes what the launcher gives.
    """

    def __init__(self, device: str | None = None) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator(cpu=device == "cpu", mixed_precision="no")
        if self.kind == "deepspeed":
            plugin = self._accelerator.state.deepspeed_plugin
            if str(plugin.offload_param_device) == "nvme":
                raise ValueError(
                    "deepspeed_config.offload_param_device: frozen copies (KL, old policy, average) are kept "
                    "where the parameters are, which cannot be a disk; got nvme, set it to none or cpu"
                )
            # Else transformers shards all that it loads, text encoders and rewards too, and nobody gathers.
            plugin.dschf = None

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def kind(self) -> str:
        """How the parameters are spread: "no", "multi_cpu", "multi_gpu", "fsdp", "deepspeed", ..."""
        return str(self._accelerator.distributed_type.value).lower()

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the parameters, or of their optimizer, rather than all of them."""
        return self.kind in ("fsdp", "deepspeed")

    @property
    def gathers(self) -> bool:
        """Whether a forward takes all ranks, as each of them holds a part of the parameters."""
        return self.kind == "fsdp" or (self.kind == "deepspeed" and self._stage == 3)

    @property
    def _stage(self) -> int:
        return int(self._accelerator.state.deepspeed_plugin.zero_stage)

    @property
    def holding(self) -> str:
        """What a rank holds of parameters and optimizer; a checkpoint is only for those who hold the same."""
        if not self.sharded:
            return "all weights"
        by = f"ZeRO-{self._stage}" if self.kind == "deepspeed" else "FSDP"
        return f"shards of {self.world} processes by {by}"

    # The network.

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, limit: float, in_part: bool = False
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as the launcher wants them; the module may come back wrapped.

        limit: that `clip` will be asked for, which DeepSpeed must know before it makes the first gradient.
        in_part: whether a forward may leave trained parameters unread; DDP then looks which they are.
        """
        if in_part:
            from accelerate.utils import DistributedDataParallelKwargs

            self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.kind == "deepspeed":
            # It asks for a batch size, of which nothing depends here: samples are dealt out by the trainer.
            config = self._accelerator.state.deepspeed_plugin.deepspeed_config
            if config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
                config["train_micro_batch_size_per_gpu"] = 1
            config["gradient_clipping"] = limit
        module, optimizer = self._accelerator.prepare(module, optimizer)
        if isinstance(module, DistributedDataParallel):
            # A frozen network's buffers do not change, and ranks need not make equally many forwards.
            module.broadcast_buffers = False
        return module, optimizer

    def unwrap(self, module: nn.Module) -> nn.Module:
        bare: nn.Module = self._accelerator.unwrap_model(module)
        return bare

    @contextmanager
    def minibatch(self, module: nn.Module, last: bool, exchange: bool = True) -> Iterator[None]:
        """Around the forward and backward of a minibatch: ranks exchange gradients only in the last one.

        exchange: whether they do at all; if not, it is for the caller to add them up by `total`.
        """
        self._accelerator.sync_gradients = last  # the optimizer would not step without
        if last and exchange:
            yield
        else:
            with self._accelerator.no_sync(module):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of a loss that is summed, not averaged, over ranks.

        DeepSpeed clips and steps in here, with the last minibatch, and leaves out a step whose gradient is
        not finite; a loss that is not makes it such a one.
        """
        scale: float | Tensor = self.world
        if self.kind == "deepspeed":
            scale = torch.where(loss.isfinite(), scale, math.nan)  # on the device: nobody waits for it
        self._accelerator.backward(loss * scale)  # every backend averages gradients over ranks

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradient down to norm `limit`; gives the norm before, over all ranks.

        Under DeepSpeed that was done; an infinite norm tells that there was no step.
        """
        norm = self._accelerator.clip_grad_norm_(parameters, limit)
        return torch.as_tensor(0.0 if norm is None else norm).detach()

    # Among ranks. What is exchanged is small: names, values, counts.

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks one after the other, on the CPU and in their dtype.

        rows: [b, ...]; b and the other sizes may differ between ranks, shorter ones are padded with 0
        (False).
        """
        rows = rows.detach()
        if self.world == 1:
            return rows.cpu()
        device, dtype = self.device, rows.dtype
        wire = rows.to(device, torch.uint8 if dtype == torch.bool else dtype)
        shapes = self._accelerator.gather(torch.tensor([wire.shape], dtype=torch.int64, device=device))
        most = shapes.amax(0).tolist()
        padded = wire.new_zeros(most)
        padded[tuple(slice(size) for size in wire.shape)] = wire
        every = self._accelerator.gather(padded[None]).cpu()  # [world, b, ...]
        parts = [every[i, :count] for i, count in enumerate(shapes[:, 0].tolist())]
        return torch.cat(parts).to(dtype)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on its device; all ranks must have the same shape."""
        if self.world == 1:
            return tensor
        summed: Tensor = self._accelerator.reduce(tensor, "sum")
        return summed

    def gather_objects(self, items: Sequence[Any]) -> list[Any]:
        """The items of all ranks one after the other."""
        if self.world == 1:
            return list(items)
        from accelerate.utils import gather_object

        return list(gather_object(list(items)))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.gather(torch.tensor([flag])).any())

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    # Sharded parameters and optimizers, which no rank holds as a whole.

    def whole(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The state dict of a sharded module, gathered on the main process; None where nothing is sharded.

        Of ZeRO-3 without the frozen parameters, which are never written; all ranks must call it.
        """
        if not self.sharded:
            return None
        if self.kind == "deepspeed" and self._stage == 3:
            return self._gathered(module)
        state: dict[str, Tensor] = self._accelerator.get_state_dict(module)
        return state

    def _gathered(self, module: nn.Module) -> dict[str, Tensor]:
        """What ZeRO-3 has sharded, gathered one parameter at a time; empty but on the main process."""
        import deepspeed

        forgetting(module)()  # what leaves the context must have entered it sharded
        state = {}
        for name, tensor in self.unwrap(module).state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters(tensor):  # no-op for a buffer
                if self.is_main:
                    state[name] = tensor.detach().to("cpu", copy=True)
        return state

    def save_sharded(self, folder: Path) -> None:
        own = {"exclude_frozen_parameters": True} if self.kind == "deepspeed" else {}
        self._accelerator.save_state(str(folder), safe_serialization=True, **own)

    def load_sharded(self, folder: Path) -> None:
        own = {"load_module_strict": False} if self.kind == "deepspeed" else {}
        self._accelerator.load_state(str(folder), **own)

    def close(self) -> None:
        """Leave the process group; the last thing a run does."""
        self._accelerator.end_training()
