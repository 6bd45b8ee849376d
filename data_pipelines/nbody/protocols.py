"""The N-body tasks: which systems, which frames.

Several tasks in the literature share the name "N-body"; they differ in horizon, generator
and size, and their errors must never share a column. Each is one row of `PROTOCOLS`.
"""

import dataclasses
import json

from data_pipelines.errors import UserError, check_known
from data_pipelines.json_text import json_text
from data_pipelines.ranges import COUNT, check_range

DT = 0.001  # of the simulator, its unit of time
SAMPLE_EVERY = 100  # steps between the frames of the official files
INTERACTIONS = ("charged", "springs", "gravity")
MAX_PARTICLES = 65_535  # edges hold two bytes a node


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One N-body task.

    Attributes:
      seed: of NumPy's legacy generator.
      draws: how many systems are drawn for train, validation and test, in this order.
      uses: how many of each, from the first, are kept.
      input_step: simulator step of the input frame.
      horizon_steps: from the input to the target, or to several, ascending.
      length: steps of the simulation in the official files; decides how many random numbers
        a system draws.
      num_particles: N.
      interaction: `charged`, `springs` or `gravity`.
      generator: whose draws give the initial states: `kipf`, `glad` or `segnn`.
      box: half the side of a cube with reflecting walls; 0: none.
      about: where it comes from; words for a person, no part of its identity.
    """

    seed: int
    draws: tuple[int, int, int]
    uses: tuple[int, int, int]
    input_step: int
    horizon_steps: tuple[int, ...]
    length: int
    num_particles: int = 5
    interaction: str = "charged"
    generator: str = "kipf"
    box: float = 0.0
    about: str = dataclasses.field(default="", compare=False)

    def to_json(self) -> dict:
        """What decides the numbers, as JSON."""
        fields = dataclasses.asdict(self)
        return json.loads(json_text({key: fields[key] for key in fields if key != "about"}))

    @property
    def horizons(self) -> tuple[float, ...]:
        """From the input to each target, in the simulator's time."""
        return tuple(steps * DT for steps in self.horizon_steps)


PROTOCOLS = {
    "egnn": Protocol(
        seed=43,
        draws=(10_000, 2_000, 2_000),
        uses=(3_000, 2_000, 2_000),
        input_step=3_100,  # frame 30; the target is frame 40
        horizon_steps=(1_000,),
        length=5_000,
        about="EGNN's nbody_small, first 3000 training systems, frames 30 to 40",
    ),
    "blog": Protocol(
        seed=42,
        draws=(3_000, 2_000, 2_000),
        uses=(3_000, 2_000, 2_000),
        input_step=700,  # frame 6; the target is frame 8
        horizon_steps=(200,),
        length=1_000,
        about="the DEMETAr post's task, frames 6 to 8; its own draws cannot be repeated: "
        "regenerated",
    ),
    "fuchs": Protocol(
        seed=42,
        draws=(5_000, 1_000, 1_000),
        uses=(5_000, 1_000, 1_000),
        input_step=3_100,
        horizon_steps=(500,),
        length=5_000,
        box=5.0,
        about="SE(3)-Transformer's sizes and horizon; its data were never released: regenerated "
        "with the walls of its public generator, frames 30 to 35; positions only",
    ),
    **{
        f"glad_{n}": Protocol(
            seed=43,
            draws=(5_000, 2_000, 2_000),
            uses=(5_000, 2_000, 2_000),
            input_step=3_001,  # frame 30; the target is frame 40
            horizon_steps=(1_000,),
            length=5_000,
            num_particles=n,
            generator="glad",
            about=f"HEGNN's and FastEGNN's {n} isolated charges, frames 30 to 40: the official "
            "generator with one worker; the published files were drawn by many, unseeded, and "
            "cannot be made again",
        )
        for n in (5, 20, 50, 100)
    },
    "gravity_100": Protocol(
        seed=43,
        draws=(10_000, 2_000, 2_000),
        uses=(10_000, 2_000, 2_000),
        input_step=3_000,  # frame 30; the target is frame 40
        horizon_steps=(1_000,),
        length=5_000,
        num_particles=100,
        interaction="gravity",
        generator="segnn",
        about="SEGNN's 100 masses under gravity, frames 30 to 40",
    ),
}
GENERAL = "general"  # the protocol whose fields the config names itself


def general_protocol(
    *,
    num_particles: int,
    interaction: str,
    horizon_steps: tuple[int, ...],
    num_train: int,
    num_validation: int,
    num_test: int,
    seed: int,
) -> Protocol:
    """A task of one's own: the input is the state after 100 steps."""
    if not 2 <= num_particles <= MAX_PARTICLES:
        raise UserError(
            f"config.data.general.num_particles ({num_particles}) must be from 2 to "
            f"{MAX_PARTICLES}."
        )
    check_known("config.data.general.interaction", interaction, INTERACTIONS)
    sizes = (num_train, num_validation, num_test)
    horizon_steps = tuple(horizon_steps)
    for steps in horizon_steps:
        check_range("A number of config.data.general.horizon_steps", steps, COUNT)
    if min(sizes) < 1:
        raise UserError(
            f"config.data.general asks for {sizes} systems: every number must be at least 1."
        )
    if list(horizon_steps) != sorted(set(horizon_steps)) or not horizon_steps:
        raise UserError(
            f"config.data.general.horizon_steps {horizon_steps} must name at least one number of "
            "steps, and several in ascending order, each once."
        )
    return Protocol(
        seed=seed,
        draws=sizes,
        uses=sizes,
        input_step=SAMPLE_EVERY,
        horizon_steps=horizon_steps,
        length=SAMPLE_EVERY + horizon_steps[-1],
        num_particles=num_particles,
        interaction=interaction,
        generator="segnn" if interaction == "gravity" else "kipf",
        about="general: by config",
    )


def get_protocol(name: str, general: dict) -> Protocol:
    """The row of `PROTOCOLS`, or for `general` the one that its own options describe."""
    if name == GENERAL:
        return general_protocol(**general)
    check_known("config.data.protocol", name, (*PROTOCOLS, GENERAL))
    return PROTOCOLS[name]
