"""A process that writes runs until it is stopped: `python writer_child.py PACK OUTPUT COUNT [LIMIT]`.

After each run that is whole on disk it prints the run's id. `LIMIT` is the largest file in bytes that it may write, as
a full disk would have it; a run that is refused ends the process with the message and code 3.
"""

import sys
from pathlib import Path


def main() -> int:
    pack, output, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, pack)
    from speedlab.common.errors import ResultsError
    from speedlab.measure.store import RunStore, new_run_id
    from speedlab_tools.stress.samples import record  # this file is a script, which no relative import works in

    if len(sys.argv) > 4:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    store = RunStore(output)
    store.check_writable()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in range(count):
        written = record().changed(run_id=new_run_id())
        try:
            store.write(written)
            store.append_csv(written)
        except ResultsError as error:
            sys.stdout.write(f"refused {error}\n")
            return 3
        sys.stdout.write(f"{written.run_id}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
