"""FLOPs that a model's mathematics needs: no recomputation, no masked scores, no padding.

2 a weight and token forward, 4 more for the gradients of what is trained; scores of causal
attention over half the square. Numbers of tokens are numpy arrays or plain numbers.
"""

import numpy as np


def text_flops(model, tokens, heads=None):
  """Forward pass over sequences of `tokens`; their last `heads` tokens (all) become logits."""
  return _products(model, tokens, tokens if heads is None else heads) + _scores(model, tokens)


def decoding_flops(model, prompts, answers):
  """Drawing `answers` tokens behind prompts that are read already, an array of each."""
  pairs = np.asarray(prompts, float) * answers + np.square(answers, dtype=float) / 2
  return (_token(model) + _head(model)) * np.sum(answers) + _score(model) * np.sum(pairs)


def vision_flops(size, image):
  """The vision tower over images, forward.

  Args:
    size: models.config.VisionConfig.
    image: int [R, W, S], the patches of R rows in windows: which image of its row each is of, 0
      where there is none.
  """
  patches = np.sum(image > 0)
  # A layer over whole images sees as many keys as its image has patches.
  squares = sum(float(np.square(np.bincount(row.reshape(-1))[1:], dtype=float).sum())
                for row in image)
  return tower_flops(size, float(patches), squares)


def tower_flops(size, patches, squares):
  """`vision` of so many patches whose images' squared numbers of patches add up to `squares`."""
  block = 4 * size.hidden**2 + 3 * size.hidden * size.mlp
  full = len(size.full_attention)
  keys = full * squares + (size.depth - full) * patches * size.window_patches
  merged = size.unit * size.hidden
  return (2 * patches * (size.depth * block + size.patch_dim * size.hidden)
          + 4 * keys * size.hidden
          + 2 * patches // size.unit * (merged**2 + merged * size.out))


def rollout_flops(model, *, prompts, answers, shared, image):
  """FLOPs of a batch of rollouts by program: "prefill", "decode".

  Args:
    model: ModelConfig.
    prompts: tokens of P prompts.
    answers: tokens of their P * G answers, those of a prompt behind each other.
    shared: of each answer's tokens, those that another answer drew (branching); 0 for all.
    image: FLOPs of the prompts' images, forward.
  """
  before = np.repeat(prompts, len(answers) // len(prompts)) + shared
  return {"prefill": float(text_flops(model, prompts, heads=0) + image),
          "decode": float(decoding_flops(model, before, answers - shared))}


def update_flops(config, model, *, prompts, answers, image, adapters):
  """FLOPs of `aepo_step` on one batch of rollouts.

  Args:
    config: AepoConfig.
    model, prompts, answers, image: as in `drawing`.
    adapters: bool, whether adapters are trained: the weights under them have no gradients.
  """
  # Of prompt tokens no log-probability is asked: the head works for answers alone.
  lengths = np.repeat(prompts, config.group) + answers
  # Policy, reference, and of several minibatches the policy before the update.
  passes = 2 + (config.loss.old_logprob == "recompute"
                and config.prompts * config.group > config.minibatch)
  towers = 1 if adapters or "vision" in config.frozen else passes + 2
  return float((passes + _back(adapters)) * _products(model, lengths, answers)
               + (passes + 2) * _scores(model, lengths) + towers * image)


def sft_flops(config, model, segment, learned, image, *, adapters):
  """FLOPs of a step of supervised training.

  Args:
    config: SftConfig.
    model: ModelConfig.
    segment: int [R, T], the example of its packed row that each token is of, 0 padding.
    learned: tokens whose log-probability is asked.
    image: FLOPs of the rows' images, forward.
    adapters: as in `update`.
  """
  lengths = np.concatenate([np.bincount(row)[1:] for row in segment])
  towers = 1 if adapters or "vision" in config.frozen else 3
  return float((1 + _back(adapters)) * _products(model, lengths, learned)
               + 3 * _scores(model, lengths) + towers * image)


def _back(adapters):
  """Gradients of products, in forward passes: of what goes in, and of the weights if trained."""
  return 1 if adapters else 2


def _products(model, tokens, heads):
  return _token(model) * np.sum(tokens) + _head(model) * np.sum(heads)


def _scores(model, tokens):
  return _score(model) * np.sum(np.square(tokens, dtype=float)) / 2


def _token(model):
  block = model.embed * model.head_dim * 2 * (model.heads + model.kv_heads) \
    + 3 * model.embed * model.mlp
  return 2.0 * model.layers * block


def _head(model):
  return 2.0 * model.vocab * model.embed


def _score(model):
  return 4.0 * model.layers * model.heads * model.head_dim  # a query and a key, both products
