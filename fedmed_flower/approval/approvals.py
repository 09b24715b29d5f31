"""A hospital's own list of what may run: app bundles and settings, in a folder of the hospital.

``approved.toml`` is the list. ``bundles`` has a copy of each approved bundle, with which a later
one is compared; ``asked`` those that runs have asked for and that are not approved.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import UserConfig

from fedmed_flower.approval.bundle import ENDING, Bundle, bundle_at, settled
from fedmed_flower.approval.rules import Rule, refused, rule_of
from fedmed_flower.approval.signature import signature_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import require_format, write_atomic
from fedmed_flower.secure.identity import key_of, key_text, read_toml, require_name, write_whole

LIST = "approved.toml"
_BUNDLES = "bundles"
_ASKED = "asked"
_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEAST_LETTERS = 8
# A server could otherwise fill the hospital's disk.
_MOST_ASKED = 20
_HEADING = "# What may run at this hospital. `fedmed approve` writes it.\n"


@dataclass(frozen=True)
class Approved:
    """A bundle that may run, or the key of a signer whose bundles may.

    Attributes
    ----------
    name : str
        The bundle's app and version, or the signer's name.
    time : str
        When it was approved, in UTC.
    rules : mapping of str to Rule
        What a run may change, by the key of the setting. All else stays as the bundle has it.
    """

    name: str
    time: str
    rules: Mapping[str, Rule]


@dataclass(frozen=True)
class Asked:
    """A bundle that runs have asked for.

    Attributes
    ----------
    bundle : Bundle
    content : bytes
        The bundle itself.
    """

    bundle: Bundle
    content: bytes


@dataclass(frozen=True)
class Approvals:
    """What may run at a hospital.

    Attributes
    ----------
    folder : Path
    bundles : mapping of str to Approved
        By digest.
    signers : mapping of bytes to Approved
        By public key.
    """

    folder: Path
    bundles: Mapping[str, Approved] = field(default_factory=dict)
    signers: Mapping[bytes, Approved] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Approvals:
        """Read the list of a folder; one without a list has approved nothing.

        Raises
        ------
        InputError
            If the list cannot be read, is malformed, or others than its owner can change it.
        FormatError
            If it was written by a later version of this package.
        """
        path = folder / LIST
        if not os.path.lexists(path):
            return cls(folder)
        remedy = "restore it from a copy, or approve again in another folder"
        table, _ = read_toml(path, remedy)
        for each in (folder, path):
            _require_own(each)
        require_format(path, table.get("format", 0), _FORMAT)
        try:
            return cls._of_table(folder, table)
        except InputError as error:
            raise InputError(f"{path}: {error}; {remedy}") from None

    @classmethod
    def _of_table(cls, folder: Path, table: dict[str, Any]) -> Approvals:
        if not {*table} <= {"format", "bundle", "signer"}:
            raise InputError("it must hold format, bundle and signer, and nothing else")
        bundles = {}
        for name, digest, each in _entries(table, "bundle", "sha256"):
            if not _DIGEST.fullmatch(digest):
                raise InputError(f"sha256 must be 64 hexadecimal digits, got {digest!r}")
            bundles[digest] = _approved(name, each)
        signers = {}
        for name, key, each in _entries(table, "signer", "public-key"):
            signers[key_of(key)] = _approved(name, each)
        return cls(folder, bundles, signers)

    def save(self) -> None:
        """Write the list.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        bundles = [
            {"name": each.name, "sha256": digest, **_content(each)}
            for digest, each in self.bundles.items()
        ]
        signers = [
            {"name": each.name, "public-key": key_text(key), **_content(each)}
            for key, each in self.signers.items()
        ]
        table = {"format": _FORMAT, "bundle": bundles, "signer": signers}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self.folder / LIST, (_HEADING + tomli_w.dumps(table)).encode(), private=False)

    def refusal(self, bundle: Bundle, config: UserConfig) -> str | None:
        """Return why a run of a bundle may not start; None if it may.

        The text may leave the hospital: it says nothing about patients.

        Parameters
        ----------
        bundle : Bundle
        config : dict
            The run config, as the hospital's ClientApp would get it.
        """
        approved = self.bundles.get(bundle.digest)
        if approved is None:
            try:
                signed = signature_of(bundle)
            except InputError as error:
                return f"{_named(bundle)} is not approved here: {error}"
            if signed is not None:
                approved = self.signers.get(signed.public)
            if approved is None:
                by = "" if signed is None else f", and {signed.name} who signed it is not either"
                return f"{_named(bundle)} is not approved here{by}"
        found = refused(bundle.settings, settled(config), approved.rules)
        if not found:
            return None
        return f"settings of {_named(bundle)} are not approved here: {'; '.join(found)}"

    def with_bundle(
        self, bundle: Bundle, content: bytes, rules: Mapping[str, Rule], now: datetime | None = None
    ) -> Approvals:
        """Return the list with one more bundle, of which a copy is kept.

        Raises
        ------
        InputError
            As `require_settings`, or if the copy cannot be written.
        """
        require_settings(bundle, rules)
        self._keep(_BUNDLES, bundle, content)
        (self.folder / _ASKED / f"{bundle.digest}{ENDING}").unlink(missing_ok=True)
        entry = Approved(f"{bundle.app} {bundle.version}", _time(now), dict(rules))
        return replace(self, bundles={**self.bundles, bundle.digest: entry})

    def with_signer(
        self, name: str, key: bytes, rules: Mapping[str, Rule], now: datetime | None = None
    ) -> Approvals:
        """Return the list with one more signer, all of whose bundles may run."""
        require_name(name, "a signer's name")
        entry = Approved(name, _time(now), dict(rules))
        return replace(self, signers={**self.signers, key: entry})

    def without(self, text: str) -> tuple[Approvals, Approved]:
        """Return the list without a bundle, given by its first digits, or a signer, by its name.

        Raises
        ------
        InputError
            If there is none, or there are several.
        """
        bundles = [digest for digest in self.bundles if _begins(digest, text)]
        signers = [key for key, each in self.signers.items() if each.name == text]
        found = [
            *(self.bundles[each] for each in bundles),
            *(self.signers[each] for each in signers),
        ]
        if len(found) != 1:
            raise InputError(
                f"{len(found)} entries of {self.folder / LIST} are {text}: give the first "
                f"{_LEAST_LETTERS} digits or more of a bundle's SHA-256, or a signer's name"
            )
        left = {key: each for key, each in self.bundles.items() if key not in bundles}
        kept = {key: each for key, each in self.signers.items() if key not in signers}
        return replace(self, bundles=left, signers=kept), found[0]

    def before(self, bundle: Bundle) -> Bundle | None:
        """Return the bundle of the same app that was approved last; None if there is none."""
        others = [digest for digest in self.bundles if digest != bundle.digest]
        for digest in sorted(others, key=lambda each: self.bundles[each].time, reverse=True):
            path = self.folder / _BUNDLES / f"{digest}{ENDING}"
            if path.exists() and (kept := _kept(path)[0]).app == bundle.app:
                return kept
        return None

    def remember(self, bundle: Bundle, content: bytes) -> bool:
        """Keep a bundle that a run has asked for; return whether there was room for it."""
        folder = self.folder / _ASKED
        path = folder / f"{bundle.digest}{ENDING}"
        if path.exists():
            return True
        if folder.is_dir() and len(list(folder.glob(f"*{ENDING}"))) >= _MOST_ASKED:
            return False
        self._keep(_ASKED, bundle, content)
        return True

    def _keep(self, part: str, bundle: Bundle, content: bytes) -> None:
        path = self.folder / part / f"{bundle.digest}{ENDING}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    def asked(self) -> list[Asked]:
        """Return the bundles that runs have asked for and that are not approved."""
        paths = sorted((self.folder / _ASKED).glob(f"*{ENDING}"))
        return [Asked(*_kept(path)) for path in paths if path.stem not in self.bundles]

    def forget(self) -> int:
        """Delete the bundles that were asked for and not approved; return their number."""
        asked = self.asked()
        for each in asked:
            (self.folder / _ASKED / f"{each.bundle.digest}{ENDING}").unlink(missing_ok=True)
        return len(asked)


def require_settings(bundle: Bundle, rules: Iterable[str]) -> None:
    """Refuse rules for settings that neither a bundle nor this package has.

    Raises
    ------
    InputError
        If there are some.
    """
    for key in rules:
        if key not in bundle.settings:
            raise InputError(
                f"{_named(bundle)} has no setting {key}: a setting that may change stands in the "
                "run config of its pyproject.toml, or is one of `fedmed settings`"
            )


def _named(bundle: Bundle) -> str:
    return f"app {bundle.app} {bundle.version} (SHA-256 {bundle.digest[:16]}...)"


def _begins(digest: str, text: str) -> bool:
    return len(text) >= _LEAST_LETTERS and digest.startswith(text.lower())


def _time(now: datetime | None) -> str:
    return (now or datetime.now(UTC)).isoformat(timespec="seconds")


def _content(entry: Approved) -> dict[str, Any]:
    rules = {key: rule.content() for key, rule in entry.rules.items()}
    return {"approved": entry.time, "settings": rules}


def _entries(table: dict[str, Any], kind: str, key: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, key and content of each entry of a kind."""
    listed = table.get(kind, [])
    if not isinstance(listed, list):
        raise InputError(f"{kind} must be a list of tables")
    found = []
    for each in listed:
        if not isinstance(each, dict) or {*each} != {"name", key, "approved", "settings"}:
            raise InputError(f"each {kind} must hold name, {key}, approved and settings")
        texts = [each["name"], each[key], each["approved"]]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"name, {key} and approved of each {kind} must be texts")
        found.append((each["name"], each[key], each))
    return found


def _approved(name: str, each: dict[str, Any]) -> Approved:
    settings = each["settings"]
    if not isinstance(settings, dict):
        raise InputError("settings must be a table of rules")
    rules = {key: rule_of(key, content) for key, content in settings.items()}
    return Approved(name, each["approved"], rules)


def _require_own(path: Path) -> None:
    """Refuse a file or folder that other users than this one and root can change."""
    status = path.stat()
    decides = f"{path} decides what code runs here"
    if status.st_uid not in (os.geteuid(), 0):
        raise InputError(f"{decides} and belongs to user {status.st_uid}: make a list of your own")
    if status.st_mode & 0o022:
        raise InputError(
            f"{decides} and has the mode {status.st_mode & 0o777:03o}, so others on this machine "
            f"can change it: chmod go-w {shlex.quote(str(path))}"
        )


def _kept(path: Path) -> tuple[Bundle, bytes]:
    """Return a kept bundle, whose file is named after its digest."""
    bundle, content = bundle_at(path)
    if bundle.digest != path.stem:
        raise InputError(f"{path} was changed since it was kept: delete it")
    return bundle, content
