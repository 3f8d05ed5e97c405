"""Score an edited model: `python evaluate.py --pack DIR --data.path FILE [--out FILE] [--quiet]`."""

from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from repair_lightning.commands.cli import guarded, only_errors
from repair_lightning.commands.evaluate import evaluate_pack
from repair_lightning.commands.parsing import parse
from repair_lightning.reports.report import print_report, verdict
from repair_lightning.storage.files import write_json


def main() -> None:
    """Load the pack and its base, ask every prompt, print the table."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--pack", required=True, help="the pack's folder")
    parser.add_argument("--data.path", default="world", help="records: a file, a hub name or 'world'")
    parser.add_argument("--data.format", default="auto", help="their format, or 'auto'")
    parser.add_argument("--data.max_edits", type=int | None, default=None, help="take the first so many")
    parser.add_argument("--data.on_bad_record", default="stop", choices=["stop", "skip"], help="as in training")
    parser.add_argument("--base", default=None, help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base")
    parser.add_argument("--out", default=None, help="write the figures to this JSON file")
    parser.add_argument(
        "--generations", default=None, help="write every prompt with every answer to this JSON Lines file"
    )
    parser.add_argument("--sample", type=int, default=0, help="score so many edits, drawn at random; 0: all")
    parser.add_argument("--quiet", action="store_true", help="only errors, and the score in one last line")
    options = parse(parser)
    data = options.data
    if options.quiet:
        only_errors()
    given = (data.path, data.format, data.max_edits, options.base, options.precision, data.on_bad_record)
    metrics = evaluate_pack(options.pack, *given, generations=options.generations, sample=options.sample)
    if options.out:
        write_json(Path(options.out), metrics)
    if options.quiet:
        Console().print(verdict(metrics, options.pack), markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(metrics, None)


if __name__ == "__main__":
    guarded(main)
