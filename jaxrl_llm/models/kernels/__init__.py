"""Attention kernels: one signature, that of `jaxrl_llm.models.attention.dense_attention`, one file a backend."""
