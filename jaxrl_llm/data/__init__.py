"""Data: where rows come from, how a row becomes token ids, and in which order they are served.

`sources` opens rows, `reasoning` generates them. `formats` turns a row into a prompt; `demonstrations`, `preferences`,
`unpaired` and `steps` say what a row is to an objective that is given completions. `prompts` and `encoded_rows` hold
what was tokenised once; `loader` and `rows` serve its batches in a checkpointable order. `tokenizers` holds a tiny one.
"""

from jaxrl_llm.extras import require

require("grain")
