"""What a `scheduler_config.json` of diffusers says, and what is refused.

It holds two things: the noise that the network was trained with, and how some sampler takes its
steps. The first has to be one that DDIM knows; of the second, what DDIM has too is taken, and what
only places the steps of other samplers is left aside.
"""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

from rlft.config import fields
from rlft.config.fields import option, suggestion
from rlft.models import config as config_lib
from rlft.types import UserError

# Samplers of networks that were trained to predict noise or v at the steps of a chain of betas.
CLASSES = (
  "DDIMParallelScheduler",
  "DDIMScheduler",
  "DDPMParallelScheduler",
  "DDPMScheduler",
  "DEISMultistepScheduler",
  "DPMSolverMultistepScheduler",
  "DPMSolverSDEScheduler",
  "DPMSolverSinglestepScheduler",
  "EulerAncestralDiscreteScheduler",
  "EulerDiscreteScheduler",
  "HeunDiscreteScheduler",
  "KDPM2AncestralDiscreteScheduler",
  "KDPM2DiscreteScheduler",
  "LMSDiscreteScheduler",
  "PNDMScheduler",
  "SASolverScheduler",
  "UniPCMultistepScheduler",
)

# Options that would change what the network predicts or is told, with the values that do not.
_HARMLESS: Mapping[str, Collection[Any]] = {
  "predict_epsilon": (True,),
  "shift_terminal": (),
  "timestep_type": ("discrete",),
  "use_dynamic_shifting": (False,),
  "use_flow_sigmas": (False,),
  "variance_type": ("fixed_large", "fixed_large_log", "fixed_small", "fixed_small_log"),
}

# Options of other samplers' steps, and of clipping, which is refused.
_IGNORED = frozenset(
  (
    "algorithm_type",
    "clip_sample_range",
    "corrector_order",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "predict_x0",
    "predictor_order",
    "sample_max_value",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "time_shift_type",
    "timestep_values",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
  )
)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """The noise of a model and the steps of DDIM; names and defaults are those of diffusers' class.

  One default differs: where nothing is said of `clip_sample`, samples are not clipped.

  Attributes:
    trained_betas: the betas themselves, in the place of `beta_start`, `beta_end` and
      `beta_schedule`; None but for models with a schedule of their own.
  """

  num_train_timesteps: int = option("timesteps of training", 1000, least=1)
  beta_start: float = option("the first beta", 1e-4, above=0, below=1)
  beta_end: float = option("the last beta", 0.02, above=0, below=1)
  beta_schedule: str = option("how betas grow", "linear", choices=("linear", "scaled_linear"))
  trained_betas: tuple | None = None
  prediction_type: str = option(
    "what the network predicts", "epsilon", choices=("epsilon", "v_prediction")
  )
  timestep_spacing: str = option(
    "where the steps are", "leading", choices=("leading", "trailing", "linspace")
  )
  steps_offset: int = option("added to the timesteps of 'leading'", 0, least=0)
  set_alpha_to_one: bool = option("the last step ends without noise", True)
  rescale_betas_zero_snr: bool = option("nothing is left of the image at the last timestep", False)
  clip_sample: bool = option("for networks of pixels, must be false", False)
  thresholding: bool = option("for networks of pixels, must be false", False)

  @classmethod
  def from_dict(
    cls, data: Mapping[str, Any], what: str = "scheduler_config.json"
  ) -> "SchedulerConfig":
    """From a parsed `scheduler_config.json`; null is the default.

    Args:
      data: the parsed file.
      what: the file, for messages.

    Raises:
      UserError: the scheduler is none that DDIM can stand in for, or an option is unknown or has a
        value that is not implemented.
    """
    check_class(data.get("_class_name"), what)
    names = {field.name for field in dataclasses.fields(cls)}
    kept = {}
    for key, value in data.items():
      if value is None or key.startswith("_") or key in _IGNORED:
        continue
      if key == "trained_betas":
        kept[key] = _betas(value, what)
      elif key in names:
        kept[key] = value
      elif key not in _HARMLESS:
        raise UserError(f"{what}: unknown option {key}={value!r}; {config_lib.USE_SUPPORTED}")
      elif value not in _HARMLESS[key]:
        raise UserError(
          f"{what}: {key}={value!r} changes what the network predicts and is not supported;"
          f" {config_lib.USE_SUPPORTED}"
        )
    found = cls(**kept)
    fields.check(dataclasses.replace(found, trained_betas=None), f"{what}: ")
    _check_together(found, what)
    return found


def check_class(name: str | None, what: str) -> None:
  """Checks that DDIM can stand in for a scheduler; None is DDIM's.

  Raises:
    UserError: it cannot.
  """
  if name is not None and name not in CLASSES:
    raise UserError(
      f"{what}: {name} samples networks that predict something else than DDIM does, or were"
      f" trained with other noise; {config_lib.USE_SUPPORTED}"
    )


def parse(text: str) -> dict[str, Any]:
  """The options in a value of `--scheduler`, which stand in the place of the file's.

  Args:
    text: 'key=value,key=value' with the keys of `SchedulerConfig`, or ''.

  Raises:
    UserError: an unknown key, or a value that the key does not take.
  """
  kinds = {field.name: field.type for field in dataclasses.fields(SchedulerConfig)}
  del kinds["trained_betas"]  # A thousand numbers are no flag.
  where, found = f"--scheduler={text}", {}
  for item in filter(None, text.split(",")):
    key, equals, value = (part.strip() for part in item.partition("="))
    if not equals:
      raise UserError(f"{where}: '{item}' is not key=value: write e.g. timestep_spacing=trailing")
    if key not in kinds:
      raise UserError(f"{where}: unknown key '{key}', {suggestion(key, kinds)}")
    if key in found:
      raise UserError(f"{where}: {key} is given twice, remove one")
    try:
      found[key] = fields.convert(value, kinds[key])
    except ValueError as error:
      raise UserError(f"{where}: {key}={value} {error}") from None
  fields.check(SchedulerConfig(**found), f"{where}: ")
  return found


def _betas(values: Any, what: str) -> tuple[float, ...]:
  """The value of `trained_betas`."""
  numbers = isinstance(values, list | tuple) and all(
    isinstance(value, int | float) and 0 < value <= 1 for value in values
  )
  if not numbers:
    raise UserError(
      f"{what}: trained_betas is no list of numbers above 0, up to 1; {config_lib.USE_SUPPORTED}"
    )
  return tuple(values)


def _check_together(config: SchedulerConfig, what: str) -> None:
  """Checks options that depend on each other."""
  betas, count = config.trained_betas, config.num_train_timesteps
  if betas is not None and len(betas) != count:
    raise UserError(
      f"{what}: trained_betas has {len(betas)} numbers; give --scheduler=num_train_timesteps="
      f"{len(betas)} in the place of {count} if they are all"
    )
  for name in ("clip_sample", "thresholding"):
    if getattr(config, name):
      raise UserError(
        f"{what}: {name} is for models of pixels, which latents are not; give --scheduler={name}="
        "false to sample without"
      )
  no_signal = config.rescale_betas_zero_snr or 1 in (betas or ())
  if no_signal and config.prediction_type == "epsilon":
    raise UserError(
      f"{what}: with rescale_betas_zero_snr, or a beta of 1, the first step has no signal, in which"
      " a network that predicts noise finds no image; give --scheduler=prediction_type=v_prediction"
      " if it predicts v, else --scheduler=rescale_betas_zero_snr=false"
    )
