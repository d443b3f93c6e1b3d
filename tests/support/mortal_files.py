"""A file system that stops to take files in the middle; importing it costs a worker as little as can be."""

import math
import os
import threading
from collections import Counter

import pyarrow as pa
from pyarrow.fs import FileSystemHandler, LocalFileSystem

STATES = TRIALS_STATE, SEARCHER_STATE, GENERATOR_STATE = ("experiment_state-", "searcher-state-", "search_gen_state-")


class Death:
    """When this process's file system stops to take what."""

    def __init__(self):
        self.lock = threading.Lock()
        self.plan(())

    def plan(self, kept_back):
        """From the snapshot after `strike` on, files of these kinds are lost; after it, all are."""
        with self.lock:
            self.kept_back, self.last, self.written, self.due = kept_back, math.inf, Counter(), False

    def strike(self):
        """Let the snapshot that has begun be the last whole one, if there is one."""
        with self.lock:
            if self.last == math.inf and self.written:
                self.last = max(self.written.values())

    @property
    def near(self):
        """Whether the last whole snapshot has begun; not without a plan, as where it is restored."""
        return bool(self.kept_back) and self.last < math.inf

    def takes(self, name):
        """Whether a file of this name still reaches the storage."""
        with self.lock:
            (kind,) = [state for state in STATES if name.startswith(state)] or [None]
            if kind is None or not self.kept_back:
                return not self.due
            self.written[kind] += 1
            dies = self.written[kind] > self.last
            self.due = self.due or dies
            return not dies or (kind not in self.kept_back and self.written[kind] == self.last + 1)


DEATH = Death()


class MortalFiles(FileSystemHandler):
    """This machine's files, as long as `DEATH` lets them be written."""

    def __init__(self):
        self.files = LocalFileSystem()

    def __reduce__(self):
        return MortalFiles, ()

    def __eq__(self, other):
        return isinstance(other, MortalFiles)

    def get_type_name(self):
        return "mortal"

    def normalize_path(self, path):
        return self.files.normalize_path(path)

    def get_file_info(self, paths):
        return self.files.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.files.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.files.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.files.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        self.files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self):
        raise NotImplementedError

    def delete_file(self, path):
        self.files.delete_file(path)

    def move(self, source, target):
        self.files.move(source, target)

    def copy_file(self, source, target):
        self.files.copy_file(source, target)

    def open_input_stream(self, path):
        return self.files.open_input_stream(path)

    def open_input_file(self, path):
        return self.files.open_input_file(path)

    def open_append_stream(self, path, metadata):
        return self.files.open_append_stream(path, metadata=metadata)

    def open_output_stream(self, path, metadata):
        if DEATH.takes(os.path.basename(path)):
            return self.files.open_output_stream(path, metadata=metadata)
        return pa.BufferOutputStream()
