"""What of a scheduler's configuration is taken, left aside and refused."""

import pytest

from rlft.diffusion import ddim
from rlft.models import scheduler_config
from rlft.models.scheduler_config import SchedulerConfig
from rlft.types import UserError

SD = {
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.39.0",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
}


def refusal(config) -> str:
  with pytest.raises(UserError) as caught:
    SchedulerConfig.from_dict(config)
  message = str(caught.value)
  assert "\n" not in message and message.startswith("scheduler_config.json: ")
  return message


def test_null_is_the_default():
  assert SchedulerConfig.from_dict({"beta_start": None, "_class_name": None}) == SchedulerConfig()
  assert ddim.alphas_cumprod({"beta_start": None, "num_train_timesteps": None})[0] == 1 - 1e-4


def test_steps_of_other_samplers_are_left_aside():
  other = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "sde-dpmsolver++",
    "use_karras_sigmas": True,
    "lambda_min_clipped": float("-inf"),
    "sigma_max": 14.6,
    "use_flow_sigmas": False,
    "variance_type": "fixed_small",
    "shift_terminal": None,
  }
  assert SchedulerConfig.from_dict(SD | other) == SchedulerConfig.from_dict(SD)


@pytest.mark.parametrize(
  "name",
  ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler", "TCDScheduler", "Mine"],
)
def test_other_noise_is_refused_by_name(name):
  assert name in refusal({**SD, "_class_name": name})


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid is not known"),
    ({"prediction_type": "sample"}, "prediction_type=sample is not known"),
    ({"timestep_spacing": "uniform"}, "timestep_spacing=uniform is not known"),
    ({"beta_start": "0.1"}, "beta_start=0.1 is not a number"),
    ({"beta_end": 1.5}, "beta_end=1.5 is out of range"),
    ({"num_train_timesteps": 0}, "num_train_timesteps=0 is out of range"),
    ({"steps_offset": True}, "steps_offset=True is not a number"),
    ({"set_alpha_to_one": "no"}, "set_alpha_to_one=no has the wrong type"),
    ({"clip_sample": True}, "give --scheduler=clip_sample=false"),
    ({"thresholding": True}, "give --scheduler=thresholding=false"),
    ({"rescale_betas_zero_snr": True}, "give --scheduler=prediction_type=v_prediction if"),
    ({"trained_betas": [0.1] * 9 + [1.0], "num_train_timesteps": 10}, "first step has no signal"),
    (
      {"trained_betas": [0.1] * 3},
      "trained_betas has 3 numbers; give --scheduler=num_train_timesteps=3",
    ),
    ({"trained_betas": 0.1}, "trained_betas is no list of numbers"),
    ({"trained_betas": [0.1, "x"]}, "trained_betas is no list of numbers"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas=True changes what the network predicts"),
    ({"timestep_type": "continuous"}, "timestep_type='continuous' changes"),
    ({"variance_type": "learned_range"}, "variance_type='learned_range' changes"),
    ({"shift": 3.0}, "unknown option shift=3.0"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(change, words):
  assert words in refusal(SD | change)


def test_options_of_the_flag():
  text = "timestep_spacing=trailing, rescale_betas_zero_snr=true,steps_offset=0,beta_end=1e-2"
  assert scheduler_config.parse(text) == {
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "steps_offset": 0,
    "beta_end": 0.01,
  }
  assert scheduler_config.parse("") == {}


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("trailing", "'trailing' is not key=value"),
    ("timestep_spacin=trailing", "unknown key 'timestep_spacin', did you mean timestep_spacing?"),
    ("timestep_spacing=trail", "timestep_spacing=trail is not known: did you mean trailing?"),
    ("steps_offset=a", "steps_offset=a is not a whole number"),
    ("steps_offset=0,steps_offset=1", "steps_offset is given twice"),
    ("set_alpha_to_one=1", "set_alpha_to_one=1 is neither true nor false"),
    ("trained_betas=0.1", "unknown key 'trained_betas'"),
  ],
)
def test_mistakes_in_the_flag(text, words):
  with pytest.raises(UserError) as caught:
    scheduler_config.parse(text)
  assert str(caught.value).startswith(f"--scheduler={text}: ") and words in str(caught.value)
