"""FLOPs that the mathematics of a model needs, without recomputation, masked scores or padding.

The forward pass takes 2 FLOPs per weight and token, the gradients 4 more if the weight is trained.
Causal attention counts half of the score matrix. Numbers of tokens are numpy arrays or plain
numbers; `model` is a ModelConfig.
"""

import numpy as np


def text_flops(model, tokens, heads=None):
  """Forward pass over sequences of `tokens`; logits of the last `heads` tokens, None = of all."""
  return _products(model, tokens, tokens if heads is None else heads) + _scores(model, tokens)


def decoding_flops(model, prompts, answers):
  """Sampling of `answers` tokens after `prompts` tokens that were read before, an array of each."""
  pairs = np.asarray(prompts, float) * answers + np.square(answers, dtype=float) / 2
  return (_token(model) + _head(model)) * np.sum(answers) + _score(model) * np.sum(pairs)


def vision_flops(size, counts):
  """Forward pass of the vision tower of a VisionConfig over the images of rows.

  `counts` int [R, 2] are each row's patches, and the sum over its images of their squared number.
  """
  return tower_flops(size, *counts.sum(0).astype(float).tolist())


def tower_flops(size, patches, squares):
  """`vision_flops` of `patches`; `squares` is the sum over images of their squared patch counts."""
  # In a full-attention block a patch attends to all patches of its image.
  gated = size.tower.activation == "silu"
  block = 4 * size.hidden**2 + (3 if gated else 2) * size.hidden * size.mlp
  full = len(size.full_attention) if size.window else size.depth
  keys = full * squares + (size.depth - full) * patches * size.window_patches
  merged = size.unit * size.hidden
  return (2 * patches * (size.depth * block + size.patch_dim * size.hidden)
          + 4 * keys * size.hidden
          + 2 * patches // size.unit * (1 + len(size.deepstack)) * (merged**2 + merged * size.out))


def rollout_flops(model, *, prompts, answers, shared, image):
  """FLOPs of a batch of rollouts by program, "prefill" and "decode".

  Args:
    model: ModelConfig.
    prompts: tokens of P prompts.
    answers: tokens of their P * G answers, prompt by prompt.
    shared: tokens of each answer that were sampled for another one (branching); 0 for none.
    image: FLOPs of a forward pass over the prompts' images.
  """
  before = np.repeat(prompts, len(answers) // len(prompts)) + shared
  return {"prefill": float(text_flops(model, prompts, heads=0) + image),
          "decode": float(decoding_flops(model, before, answers - shared))}


def update_flops(config, model, *, prompts, answers, image, adapters):
  """FLOPs of `aepo_step` on one batch of rollouts.

  With `config.share_prompts` a prompt counts once, else once for each of its answers.

  Args:
    config: AepoConfig.
    model, prompts, answers, image: as in `rollout_flops`.
    adapters: bool, whether adapters are trained; the base weights then have no gradients.
  """
  # Only answers need log-probabilities, so only they need logits.
  answers, times = np.asarray(answers, float), 1 if config.share_prompts else config.group
  tokens = times * np.sum(prompts) + np.sum(answers)
  pairs = (times * np.sum(np.square(prompts, dtype=float)) / 2
           + np.sum(np.repeat(prompts, config.group) * answers + np.square(answers) / 2))
  # Policy and reference, and with several minibatches the policy before the update.
  passes = 2 + (config.loss.old_logprob == "recompute"
                and config.prompts * config.group > config.minibatch)
  towers = 1 if adapters or "vision" in config.frozen else passes + 2
  return float((passes + _back(adapters)) * _products(model, tokens, answers)
               + (passes + 2) * _score(model) * pairs + towers * image)


def sft_flops(config, model, lengths, learned, image, *, adapters):
  """FLOPs of a step of supervised training.

  Args:
    config, model: SftConfig, ModelConfig.
    lengths: tokens of each example.
    learned: tokens whose log-probability is needed.
    image: FLOPs of a forward pass over the examples' images.
    adapters: as in `update_flops`.
  """
  towers = 1 if adapters or "vision" in config.frozen else 3
  return float((1 + _back(adapters)) * _products(model, lengths, learned)
               + 3 * _scores(model, lengths) + towers * image)


def _back(adapters):
  """Cost of the gradients of products, in forward passes: of inputs, and of trained weights."""
  return 1 if adapters else 2


def _products(model, tokens, heads):
  return _token(model) * np.sum(tokens) + _head(model) * np.sum(heads)


def _scores(model, tokens):
  return _score(model) * np.sum(np.square(tokens, dtype=float)) / 2


def _token(model):
  attention = model.embed * model.head_dim * 2 * (model.heads + model.kv_heads)
  return 2.0 * model.layers * (attention + 3 * model.embed * model.mlp)


def _head(model):
  return 2.0 * model.vocab * model.embed


def _score(model):
  return 4.0 * model.layers * model.heads * model.head_dim  # of a query and a key: q k and p v
