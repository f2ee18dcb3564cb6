"""Write README.md from nbs/index.ipynb: `make readme`. With --check, only say whether it is current."""
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The README's text: the notebook as Markdown, its links seen from the project's root."
    notebook = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}      # cleaned notebooks do not keep it; it names the language of code blocks
    text, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    text = re.sub(r"\]\(\.\./", "](", text)
    text = re.sub(r"\]\((?=(?:core|data|training|evaluation|reporting|world|runs|tour)/)", "](nbs/", text)
    return "<!-- generated from nbs/index.ipynb by `make readme`: edit the notebook -->\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    current = (ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else ""
    if "--check" in sys.argv: sys.exit(0 if current == readme() else "README.md is not what nbs/index.ipynb says: make readme")
    (ROOT/"README.md").write_text(readme(), encoding="utf-8")
