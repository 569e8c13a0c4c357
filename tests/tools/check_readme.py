"""Runs the ```bash and ```python blocks of README.md and docs/*.md as they stand there, only with fewer frames.

    python tests/tools/check_readme.py

Left out are what the gate does anyway (the environment, the tests), and what needs downloaded weights or several
machines; where a model is only named, the embedded CLIP takes its place. It takes some minutes; the exit status is 1 if
a command fails.
"""

import glob
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEWER = {
    "sac_vlmrm.py": "--total-timesteps 400 --learning-starts 200 --batch-size 32 --episode-length 20",
    "ppo_vlmrm.py": "--total-timesteps 320 --num-steps 20 --episode-length 20",
}
FEWER_FOR_BOTH = "--num-envs 4 --eval-every 200 --eval-episodes 2 --device cpu"


def commands_of(text):
    """The commands in ```bash blocks, without comments and continuation lines."""
    for block in re.findall("```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


def shorten(words, run_dir, new_dir):
    """A command with fewer frames, and folders of this check: RUN_DIR is a run that is there."""
    words = [word.replace("RUN_DIR", str(run_dir)) for word in words]
    script = next((word for word in words if word in FEWER), None)
    if words[0] == "python":
        words[0] = sys.executable
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    if not script or "--play" in words:
        return [word if word != "100" else "2" for word in words]  # --eval-episodes 100
    if "--clip" in words:
        words[words.index("--clip") + 1] = "tests/tiny_clip"
    if "--run-dir" not in words and "--resume" not in words:
        words += ["--run-dir", str(new_dir)]
    if "--resume" in words:
        return [*words, "--total-timesteps", "480"]
    if "--clip" not in words:
        words += ["--clip", "tests/tiny_clip"]
    return [*words, *FEWER[script].split(), *FEWER_FOR_BOTH.split()]


def is_skipped(words):
    """What the gate does itself, and what needs weights or machines that are not there."""
    line = " ".join(words)
    return (
        words[0] in (".", "pip", "python3")
        or "pytest" in line
        or "--preset paper" in line
        or "--nnodes" in line
        or "ViT-H-14" in line
    )


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "0"  # of the first command, which the others play, resume and judge
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
            text = page.read_text().replace("runs/four", f"{folder}/four")
            wanted = [words for words in commands_of(text) if not is_skipped(words)]
            name = "" if page.name == "README.md" else page.stem
            lines = [shorten(words, run_dir, Path(folder) / f"{name}{i}") for i, words in enumerate(wanted)]
            code = re.findall("```python\n(.*?)```", text, re.DOTALL)
            lines += [[sys.executable, "-c", block.replace("RUN_DIR", str(run_dir))] for block in code]
            for line in lines:
                files = [glob.glob(word) if "*" in word and "\n" not in word else [word] for word in line]
                result = subprocess.run(sum(files, []), cwd=ROOT, capture_output=True, text=True)
                verdict = "FAILED" if result.returncode else "ok"
                print(f"{verdict:6} {page.name}: {shlex.join(line)[:140]}", flush=True)
                if result.returncode:
                    print(result.stderr[-2000:])
                    failed += 1
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
