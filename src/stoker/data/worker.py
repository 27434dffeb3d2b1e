"""The program of a preparation worker (`python -m stoker.data.worker`), which `stoker.data.workers` starts."""

from stoker.data.workers import serve

if __name__ == "__main__":
    serve()
