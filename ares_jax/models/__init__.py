"""Qwen2.5-VL as plain pytrees of weights and pure functions over them."""
