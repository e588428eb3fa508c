"""The second version of GPTQ's format, as GPTQModel calls it: zero points are stored as they are, from 0.

It is read by GPTQModel, by transformers with it, and by vLLM and SGLang. All else is as in `formats.gptq`.
"""

from __future__ import annotations

from accullm_cli.formats.gptq import GptqFormat

FORMAT = GptqFormat("gptq_v2", less=0)
