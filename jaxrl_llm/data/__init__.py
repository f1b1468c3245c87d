"""Data: where rows come from, how a row becomes a prompt, and in which order prompts are served.

`sources` opens rows, `reasoning` generates them, `formats` turns a row into a prompt, `prompts` tokenises a
whole data set once, `loader` serves its batches in a checkpointable order, `tokenizers` holds a tiny tokenizer.
"""
