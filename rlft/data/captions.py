"""Which captions a reward for even shares of skin tones may be trained on.

A caption that names a race, an ethnicity or a colour of skin asks for it: what is drawn cannot be
even (arXiv 2401.12244 drops them). Rather a caption too many is dropped than one too few, which
would cost the claim. The words are in `rlft/data/words`, with what is among them and why.
"""

import functools
import re
import unicodedata

from rlft.data.compose import words

# In the paper's list of occupations, but more often something else in a caption.
_NO_PEOPLE = frozenset({"cook", "decorator", "director", "porter", "printer", "vet"})
# With a word for people in it, but without any.
_NOT_PEOPLE = re.compile(
  r"(?<!\w)(?:(?:record|cd|dvd|mp3|media|music|video) players?"
  r"|baby (?:animal|bear|bird|calf|carrot|cow|deer|duck|elephant|giraffe|goat|grand|horse|kangaroo"
  r"|lamb|monkey|panda|penguin|rhino|seal|sheep|zebra)\w*|(?:ceiling|electric|desk) fans?"
  r"|queen (?:size|bed)\w*|(?:king|queen|two|four)[ -]person \w+|man ?hole\w*|man made|lady ?bugs?"
  r"|human[ -]sized? \w+|coffee table books?)(?!\w)"
)
# What may stand between a word that describes a person and the person.
_BETWEEN = (
  r"adults?|aged|attractive|bald|bearded|beautiful|big|blonde?|brunette|business|chubby|college|cute"
  r"|elderly|fat|fellow|female|feminine|gay|gorgeous|goth|gothic|handsome|happy|high school"
  r"|homeless|large|lesbian|little|looking|lovely|male|married|masculine|middle|muscular|naked|nude"
  r"|old|older|police|poor|pregnant|pretty|professional|rich|school|senior|sexy|shirtless|short"
  r"|single|skinny|slender|slim|small|smiling|strong|tall|teen|teenage|thin|tiny|trans|transgender"
  r"|unidentified|unknown|upper class|well dressed|working|working class|young|younger"
  r"|\w+[ -](?:aged|eyed|haired|year|years|old)"
)
_COLOURS = (
  "black|bronzed?|brown|dark|deep|ebony|fair|golden|ivory|light|olive|pale|porcelain|tan|tanned|white"
  "|yellow"
)
# Of these, too, the words that describe people make something ethnic.
_OF_PEOPLE = "ancestry|communit(?:y|ies)|culture|descent|heritage|history|lives|origins?|roots"


def ethnic_term(caption: str) -> str:
  """The first term of race, ethnicity or skin colour of a caption; empty if there is none."""
  text = _plain(caption)
  found = [match for pattern in _patterns() if (match := pattern.search(text))]
  return min(found, key=re.Match.start)[0] if found else ""


def has_people(caption: str) -> bool:
  """Whether a caption names a person."""
  return bool(_people().search(_NOT_PEOPLE.sub(" ", _plain(caption))))


def _plain(caption: str) -> str:
  """A caption in small letters, with plain apostrophes, hyphens and single spaces."""
  text = unicodedata.normalize("NFKC", caption).lower()
  text = re.sub("[\u2018\u2019\u02bc`]", "'", re.sub("[\u2010-\u2015]", "-", text))
  return " ".join(text.replace("_", " ").split())


def _any_of(terms) -> str:
  """A pattern for terms, the longest first; spaces stand for hyphens, too."""
  ordered = sorted(terms, key=len, reverse=True)
  return "|".join(re.escape(term).replace(r"\ ", "[ -]?") for term in ordered)


def _person() -> str:
  people = {*words("people"), *(word.lower() for word in words("occupations"))} - _NO_PEOPLE
  forms = {*people}
  for word in people:
    is_y = re.search("[^aeiou]y$", word)
    forms |= {f"{word[:-1]}ies"} if is_y else {f"{word}s", f"{word}es"}
  return _any_of(forms)


@functools.cache
def _people() -> re.Pattern[str]:
  return re.compile(rf"(?<![\w-])(?:{_person()})(?![\w-])")


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
  always, describing = (_any_of(words(name)) for name in ("ethnicity", "describing"))
  person = _person()
  return tuple(
    re.compile(pattern)
    for pattern in (
      rf"(?<!\w)(?:{always})(?:s|es)?(?!\w)",
      rf"(?<!\w)(?:{_COLOURS})[ -]?(?:skin|skinned|complexion|complexioned)(?!\w)",
      rf"(?<!\w)(?:skin|complexion) (?:is|was) (?:very )?(?:{_COLOURS})(?!\w)",
      # "a Black woman", "white and black teenage boys", "a white, elderly man"
      rf"(?<!\w)(?:{describing})(?:,? (?:and |or |& )?(?:an? )?(?:{describing})"
      rf"|[ -](?:{describing})|,? (?:{_BETWEEN}))*[ -](?:{person}|{_OF_PEOPLE})(?!\w)",
      # "the man is black.", "women who are French and"
      rf"(?<!\w)(?:{person})(?: who| that)? (?:is|are|was|were) (?:{describing})"
      r"(?= (?:and|or|but|with)(?!\w)|[^\w\s-]|$)",
    )
  )
