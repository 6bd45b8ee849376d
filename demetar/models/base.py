"""What a model is: a flax module for one padded graph, and what it declares about itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from data_pipelines.errors import UserError, check_known
from data_pipelines.graph import Array, Graph
from data_pipelines.ranges import BELOW_ONE, COUNT, POSITIVE, check_range, whole_from
from data_pipelines.targets import Target

EMBEDDING = "kept_embedding"  # of the graph's last features; a name that no layer of a model has
# What `symmetries` may name: positions turn, reflect and shift with the input, velocities turn and
# reflect, and all other targets stay; nodes may come in any order.
SYMMETRIES = frozenset({"rotation", "reflection", "translation", "permutation"})


class GraphModel(nn.Module):
    """The base of all models.

    A field with a default is an option of `config.model`. A field without one is a fact that the
    data set gives: `targets`, `elements` (atomic numbers) or one of `Dataset.model_facts`.

    Attributes:
      targets: what to predict, each with the read-out to use.
    """

    READOUTS: ClassVar[tuple[str, ...]] = ()  # of `data_pipelines.targets.READOUTS`
    CHOICES: ClassVar[dict[str, tuple]] = {}  # option -> the values that it may have
    # The least of whole numbers, where that is not 1; other numbers are above 0.
    LEAST: ClassVar[dict[str, int]] = {}
    symmetries: ClassVar[frozenset[str]] = SYMMETRIES
    # Which of `node_feature` and `graph_feature` it reads, where the data have them.
    READS: ClassVar[frozenset[str]] = frozenset()
    # Path of a parameter -> how its dimensions are divided over the mesh axes `fsdp` and `model`;
    # the first that matches. The first matrix of a pair is divided by its columns, the second by
    # its rows (Shoeybi et al. 2019, Megatron-LM), so a block needs one sum after each pair.
    SHARDING_RULES: ClassVar[tuple[tuple[str, P], ...]] = (
        (r"/head_\w+/.*kernel$", P("fsdp")),
        (r"/head_\w+/.*bias$", P()),
        (r"/(query|kv|hidden)/kernel$", P("fsdp", "model")),
        (r"/hidden/bias$", P("model")),
        (r"/out/kernel$", P("model", "fsdp")),
        (r"/(kernel|table)$", P("fsdp")),
    )

    targets: tuple[Target, ...]

    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        """One graph -> name of each target -> `[]`, `[N]` or `[N, 3]`, as its read-out says.

        Standardised, in the dtype of positions or wider. Dropout draws from the rng stream
        `dropout`, if not `deterministic`. Padded slots must change nothing.
        """
        raise NotImplementedError

    def keep_embedding(self, embedding_D: Callable[[], Array]) -> None:
        """Keeps features `[D]` of the whole graph, the last before its read-out, for who asks.

        A function, because a training program must have nothing of it, not even unused.
        """
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", EMBEDDING, embedding_D())

    def check(self) -> None:
        """Refuses options that are out of range or do not fit each other; a subclass extends it."""
        for option, known in self.CHOICES.items():
            check_known(f"config.model.{option}", getattr(self, option), known)
        for field in dataclasses.fields(self):
            if field.name not in self.CHOICES:
                self._check_range(field.name, field.default)
        for readout, plural in (("position", "positions"), ("velocity", "velocities")):
            if len(names := self.names(readout)) > 1:
                raise UserError(
                    f"A model predicts {plural} at one time, but the targets are {names}: "
                    "choose one."
                )
        width, heads = getattr(self, "width", 1), getattr(self, "num_heads", 1)
        if width % heads:
            raise UserError(
                f"config.model.width ({width}) must be a multiple of config.model.num_heads "
                f"({heads})."
            )

    def _check_range(self, option: str, default: Any) -> None:
        """By the type of its default."""
        what, value = f"config.model.{option}", getattr(self, option)
        if option == "dropout":
            check_range(what, value, BELOW_ONE)
        elif type(default) is float:
            check_range(what, value, POSITIVE)
        elif type(default) is int:
            check_range(what, value, whole_from(self.LEAST.get(option, 1)))
        elif isinstance(default, tuple):
            for number in value:
                check_range(f"A number of {what}", number, COUNT)

    def check_model_axis(self, size: int) -> None:
        """Refuses a mesh whose axis `model` does not divide the attention heads."""
        heads = getattr(self, "num_heads", 1)
        if heads > 1 and heads % size:
            fit = [m for m in range(1, heads + 1) if heads % m == 0]
            nearest = min(fit, key=lambda m: abs(m - size))
            raise UserError(
                f"config.mesh.model ({size}) must divide the attention heads ({heads}); the "
                f"nearest that does is {nearest}."
            )

    def names(self, readout: str) -> list[str]:
        """Targets with this read-out, in their order."""
        return [target.name for target in self.targets if target.readout == readout]

    @property
    def position(self) -> str | None:
        """The target that is read out as positions, if any."""
        return next(iter(self.names("position")), None)

    @property
    def velocity(self) -> str | None:
        """The target that is read out as velocities, if any."""
        return next(iter(self.names("velocity")), None)
