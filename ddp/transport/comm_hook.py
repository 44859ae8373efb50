"""DDP's comm hook: a gradient bucket goes to the transport, its average comes back in a future.

The hook never raises: DDP would turn an exception in a future into an unreadable cast error. It keeps the error
and gives the bucket back; `GradientExchange.take` raises it right after backward, before any optimizer step.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp.board import PhaseBoard
from ddp.errors import TransportError, UsageError
from ddp.outcome import annotate
from ddp.transport.base import BucketState, Reduction, Transport
from ddp.transport.left_over import LeftOver, State
from ddp.transport.projection import BucketProjection, SmallParameters
from ddp.transport.row import NO_PROJECTION, StepRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of one DDP bucket, in the order in which their gradients lie there, and what goes with them."""

    parameters: tuple[Tensor, ...]
    state: BucketState
    projection: BucketProjection


@dataclass(frozen=True, slots=True)
class GradientSums:
    """What one backward's buckets add up to."""

    own_squared_norm: float
    mean_squared_norm: float
    layouts: tuple[Layout, ...] = ()
    projection: tuple[float, ...] = NO_PROJECTION  # of the own gradient, see ddp.transport.projection
    scale: float = 1.0  # that the own gradient still has in the layouts

    def unscaled(self, scale: float) -> "GradientSums":
        """Those of a loss that was multiplied by `scale`, and whose gradient entered the mean with that undone."""
        if scale == 1.0:
            return self
        return replace(
            self,
            own_squared_norm=self.own_squared_norm / scale**2,
            projection=tuple(value / scale for value in self.projection),
            scale=scale,
        )

    def by_parameter(self) -> dict[Tensor, tuple[float, float]]:
        """Each parameter's squared norm, of its own gradient and of the mean; to be asked before the next backward."""
        return {
            parameter: (float(own) / self.scale**2, float(mean))
            for layout in self.layouts
            for parameter, own, mean in zip(
                layout.parameters, layout.state.own_squared_norms, layout.state.mean_squared_norms, strict=True
            )
        }


class GradientExchange:
    """One model's gradient buckets, step by step; the state that DDP hands to `comm_hook`.

    Attributes:
        weight: this rank's weight in the mean, set before backward; 1 / world_size unless told.
        step: the number of the step under way, from a trainer that counts them and shows it beside an error.
        bytes_total: gradient bytes handed to the transport so far.
        board: where the trainer says which phase this rank is in; the hook comes in the middle of one.
    """

    board: PhaseBoard | None = None

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.weight = 1.0 / transport.world_size
        self.step: int | None = None
        self.bytes_total = 0
        self._hook_seconds = 0.0
        self._small = SmallParameters(())
        self._layouts: dict[int, Layout] = {}
        self._reductions: list[Reduction] = []
        self._detached = False
        self._backwards = 0
        self._complete = True
        self._error: Exception | None = None
        self._left_over = LeftOver()

    @property
    def blocked_seconds(self) -> float:
        """Time so far in which backward stood still for the exchange: in the hook, and after it for the averages."""
        return self._hook_seconds + self.transport.exposed_seconds

    def prepare(self, model: DistributedDataParallel) -> None:
        """Get the transport ready for the model's gradients, before the first of them has a deadline."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        dtypes = {parameter.dtype for parameter in parameters}
        self._small = SmallParameters(parameters)
        self.transport.prepare(dtypes & self.transport.dtypes)

    def state_dict(self) -> State:
        """What quantising has left over, by bucket."""
        return self._left_over.state_dict(self._states())

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whatever there is can be taken: what belongs to other buckets is left aside."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._left_over.load_state_dict(state, self._states())

    def forget_left_over(self) -> None:
        """Nothing is left over of the gradients so far: they are not to be gone on from."""
        self.load_state_dict({"left_over": {}})

    def _states(self) -> dict[int, BucketState]:
        return {index: layout.state for index, layout in self._layouts.items()}

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Send one bucket; a new backward's first bucket drops what the previous one left."""
        began = time.perf_counter()
        phase = self.board.interrupt("all-reduce") if self.board else ""
        if self._complete:
            self._error = self._error or self._error_on_the_way()
            self._reductions, self._detached = [], False
            self._backwards += 1
        self._complete = bucket.is_last()
        buffer = bucket.buffer()
        future = self.attempt(lambda: self._send(bucket, buffer))
        if self._complete:
            self._complete_all()
        if self.board:
            self.board.interrupt(phase)
        self._hook_seconds += time.perf_counter() - began
        return _completed(buffer) if future is None else future

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Run `action` unless something failed before; keep its error for `raise_error`."""
        if self._error is not None:
            return None
        try:
            return action()
        except Exception as error:  # kept, see the module's docstring
            self._error = self._error_on_the_way() or error
            return None

    def raise_error(self) -> None:
        """Raise what went wrong in the newest backward's exchange, inside the hook or after it."""
        self._error = self._error or self._error_on_the_way()
        if self._error is not None:
            raise self._error

    def detach(self) -> list[Reduction]:
        """The buckets of the backward that just ended, once each; their sums may still be on their way."""
        detached, self._detached = self._detached, True
        return [] if detached else self._reductions

    def by_parameter(self) -> dict[Tensor, tuple[float, float]]:
        """As `GradientSums.by_parameter`, of the newest backward, detached or not; waits for the device."""
        return GradientSums(0.0, 0.0, tuple(self._layouts.values())).by_parameter()

    def take(self) -> GradientSums:
        """The sums of the backward that just ended; waits for them.

        Raises:
            TransportError: whatever the transport raised, with the bucket it was in.
        """
        self.raise_error()
        sums = add_up(self.detach())
        return replace(sums, layouts=tuple(self._layouts.values()))

    def exchange_row(self, row: StepRow) -> list[StepRow]:
        """Give this rank's row and get everyone's; a collective of its own.

        Raises:
            TransportError: whatever the transport raised.
        """
        try:
            return [StepRow.unpack(each) for each in self.transport.exchange_row(row.pack())]
        except TransportError as error:
            annotate(error, step=self.step)
            raise

    def _send(self, bucket: dist.GradBucket, buffer: Tensor) -> Future[Tensor]:
        if buffer.layout != torch.strided:
            raise UsageError("sparse gradients are not averaged: build the embedding with sparse=False")
        self.bytes_total += buffer.numel() * buffer.element_size()
        if buffer.dtype not in self.transport.dtypes:
            raise UsageError(
                f"{buffer.dtype} gradients are not averaged: keep parameters in a real floating-point type"
            )
        try:
            layout = self._layout_of(bucket)
            projection = layout.projection.of(buffer)  # before the bucket is overwritten
            reduction = self.transport.all_reduce_mean_(buffer, self.weight, layout.state)
        except TransportError as error:
            self._locate(error, bucket.index())
            raise
        reduction.projection = projection
        self._reductions.append(reduction)
        return reduction.future or _completed(buffer)

    def _layout_of(self, bucket: dist.GradBucket) -> Layout:
        """The bucket's from the last step, unless DDP has built its buckets anew.

        A rebuild may keep a bucket's index and length and change the order inside. To look at the parameters
        each time takes 0.05 us a parameter; nothing public of DDP's says that it has rebuilt them.
        """
        index, parameters = bucket.index(), bucket.parameters()
        layout = self._layouts.get(index)
        if (
            layout is None
            or len(layout.parameters) != len(parameters)
            or not all(map(is_, layout.parameters, parameters))
        ):
            self._layouts[index] = layout = self._lay_out(parameters, bucket.buffer())
            self._left_over.hand_to(index, layout.state)
        if bucket.is_last() and len(self._layouts) > index + 1:
            self._layouts = {kept: self._layouts[kept] for kept in range(index + 1)}
        return layout

    def _lay_out(self, parameters: list[Tensor], buffer: Tensor) -> Layout:
        state = BucketState.of([_elements(parameter) for parameter in parameters])
        if state.ends[-1] != buffer.numel():
            raise TransportError(
                f"a bucket of {buffer.numel()} elements holds parameters of {state.ends[-1]}: "
                "this version of torch lays out its buckets in a way that is not known here"
            )
        return Layout(tuple(parameters), state, self._small.in_bucket(parameters, state.ends.tolist(), buffer.device))

    def _complete_all(self) -> None:
        """Also after an error: DDP waits for every bucket's future."""
        try:
            self.transport.complete()
        except Exception as error:  # kept, see the module's docstring
            self._error = self._error or self._error_on_the_way() or error

    def _error_on_the_way(self) -> Exception | None:
        """The first reduction's that failed after the hook had handed it over; a bucket's place is its index."""
        for index, reduction in enumerate(self._reductions):
            if reduction.error is not None:
                self._locate(reduction.error, index)
                return reduction.error
        return None

    def _locate(self, error: Exception, index: int) -> None:
        """Say in the error where it was; a step's number comes from whoever counts them."""
        where = f"bucket {index}" if self.step is not None else f"bucket {index} of backward {self._backwards}"
        error.args = (f"{error}, in {where}",)
        annotate(error, step=self.step)


def add_up(reductions: list[Reduction]) -> GradientSums:
    """The sums of a whole gradient from those of its buckets."""
    projections = [reduction.projection.tolist() for reduction in reductions if reduction.projection is not None]
    return GradientSums(
        sum(float(reduction.own_squared_norm) for reduction in reductions),
        sum(float(reduction.mean_squared_norm) for reduction in reductions),
        projection=tuple(map(sum, zip(NO_PROJECTION, *projections, strict=True))),
    )


def comm_hook(state: GradientExchange, bucket: dist.GradBucket) -> Future[Tensor]:
    """The function that DDP calls; it insists on these names and on evaluated annotations."""
    return state.reduce(bucket)


def register(model: DistributedDataParallel, state: object, hook: Callable[..., Future[Tensor]]) -> None:
    """Make `hook` the model's comm hook.

    Raises:
        UsageError: the model has a comm hook already; DDP allows one.
    """
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        raise UsageError(
            "this DistributedDataParallel model already has a communication hook and DDP allows only one: "
            f"remove the other register_comm_hook or ddp.attach ({str(error).splitlines()[0]})"
        ) from None


def _elements(parameter: Tensor) -> int:
    """Of its gradient in a bucket, where DDP puts two real numbers for a complex one."""
    return 2 * parameter.numel() if parameter.is_complex() else parameter.numel()


def _completed(bucket: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(bucket)
    return future
