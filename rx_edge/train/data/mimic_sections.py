"""Sections of a MIMIC-CXR report, by the rules that its authors publish.

Source: MIT-LCP/mimic-cxr, `txt/section_parser.py` and `create_section_files.py` (MIT licence): the
heading's form, the normalised names, that the last section of a name wins, and the studies whose
report does not follow the form. Written anew; the tables are theirs.

Does not cover: their `last_paragraph`, which is neither findings nor impression.
"""

from __future__ import annotations

import re

_HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")

_NAMES = {  # heading in lower case -> section, where the rules below would not tell
    "findings": ("finding", "findins", "findindgs", "findgings", "findngs", "findnings",
                 "finidngs", "reference findings", "chest, two views"),
    "impression": ("conclusion", "findings and impression", "findings/impression",
                   "findings/ impression", "ndication", "impresson", "imprression", "imoression",
                   "impressoin", "imprssion", "impresion", "imperssion", "mpression", "impession"),
    "history": ("history", "clinical history", "clinical information", "patient history", "pfi"),
    "comparison": ("comparison", "comparisons", "comparison exam", "comparison film",
                   "reference exam", "comparision", "comparsion", "comparrison", "comparisions"),
    "indication": ("indication", "reason for examination", "reason for exam",
                   "clinical indication", "idication"),
    "examination": ("examination", "exam", "type of examination"),
    "recommendations": ("recommendation", "recommendations", "recommendation(s)"),
    "wet read": ("wet read", "wetread"),
}  # fmt: skip
_NORMALISED = {alias: name for name, aliases in _NAMES.items() for alias in aliases}
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")
_TITLE_OF_FINDINGS = re.compile(
    "chest|portable|pa and lateral|lateral and pa|ap and lateral|lateral and ap|frontal and"
    "|two views|frontal view|pa view|ap view|one view|lateral view|bone window|frontal upright"
    "|frontal semi-upright|ribs|pa and lat"
)

# reports whose findings stand under another heading
_FINDINGS_UNDER = {
    "s50913680": "recommendations", "s59363654": "examination", "s59279892": "technique",
    "s59768032": "recommendations", "s57936451": "indication", "s50058765": "indication",
    "s53356173": "examination", "s53202765": "technique", "s50808053": "technique",
    "s51966317": "indication", "s50743547": "examination", "s56451190": "note",
    "s59067458": "recommendations", "s59215320": "examination", "s55124749": "indication",
    "s54365831": "indication", "s59087630": "recommendations", "s58157373": "recommendations",
    "s56482935": "recommendations", "s58375018": "recommendations", "s54654948": "indication",
    "s55157853": "examination", "s51491012": "history",
}  # fmt: skip
# reports whose findings are these characters
_FINDINGS_AT = {
    "s50525523": (201, 349), "s57564132": (233, 554), "s59982525": (313, 717),
    "s53488209": (149, 475), "s54875119": (234, 988), "s50196495": (59, 399),
    "s56579911": (59, 218), "s52648681": (292, 631), "s59889364": (172, 453),
    "s53514462": (73, 377), "s59505494": (59, 450), "s53182247": (59, 412),
    "s51410602": (47, 320), "s56412866": (522, 822), "s54986978": (59, 306),
    "s59003148": (262, 505), "s57150433": (61, 394), "s56760320": (219, 457),
    "s59562049": (158, 348), "s52674888": (145, 296), "s55258338": (192, 568),
    "s59330497": (140, 655), "s52119491": (179, 454),
}  # fmt: skip
_NO_FINDINGS = {"s58235663", "s50798377", "s54168089", "s53071062", "s56724958", "s54231141",
                "s53607029", "s52035334"}  # fmt: skip


def findings_and_impression(study: str, text: str) -> tuple[str, str]:
    """The two sections of a report, "" where there is none.

    Args:
        study: as in the file's name, `s50414267`: some studies have rules of their own.
        text: the whole file, with one space before every line as published.
    """
    if study in _NO_FINDINGS:
        return "", ""
    if study in _FINDINGS_AT:
        begin, end = _FINDINGS_AT[study]
        return text[begin:end].strip(), ""
    sections = _sections(text)
    if study in _FINDINGS_UNDER:
        return sections.get(_FINDINGS_UNDER[study], ""), ""
    return sections.get("findings", ""), sections.get("impression", "")


def indication(study: str, text: str) -> str:
    """Why the study was asked for, else its history; "" where a report has neither.

    Only the first paragraph, as findings without a heading may follow it, and without the `___` of
    de-identification. A study with rules of its own has none: there, what stands under that heading
    may be the findings.
    """
    if study in _NO_FINDINGS | _FINDINGS_AT.keys() | _FINDINGS_UNDER.keys():
        return ""
    sections = _sections(text)
    found = sections.get("indication") or sections.get("history", "")
    return re.split(r"\n\s*\n", found)[0].replace("_", "")


def _sections(text: str) -> dict[str, str]:
    """Section -> its text, the last one of a name; empty findings and impressions do not count.

    Without findings and impression, what follows the first empty line of the last section is the
    authors' `last_paragraph` and no part of that section.
    """
    found: dict[str, str] = {}
    last, heading = "", _HEADING.search(text)
    while heading:
        begin = heading.end()
        # the published rule looks for the next heading after the end of this one's line only
        following = _HEADING.search(text, begin + max(0, text[begin:].find("\n")))
        body = text[begin : following.start() if following else len(text)]
        name = _normalised(heading[1])
        if body.strip() or name not in ("findings", "impression"):
            found[name], last = body, name
        heading = following
    if last and not found.keys() & {"findings", "impression"}:
        found[last] = found[last].partition("\n \n")[0]
    return {name: body.strip() for name, body in found.items()}


def _normalised(heading: str) -> str:
    name = heading.lower().strip()
    if name in _NORMALISED:
        return _NORMALISED[name]
    contained = next((word for word in _CONTAINED if word in name), None)
    if contained:
        return contained
    return "findings" if _TITLE_OF_FINDINGS.search(name) else name
