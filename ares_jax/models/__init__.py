"""Qwen-VL and text models as plain pytrees of weights and pure functions over them."""
