"""Which captions a reward for even shares of skin tones may be trained on.

A caption that names a race, an ethnicity or a colour of skin asks for it: what is drawn cannot be
even (arXiv 2401.12244 drops them). Rather a caption too many is dropped than one too few, which
would cost the claim. The words are in `rlft/data/words`, with what is among them and why.
"""

from collections.abc import Iterable, Iterator
import functools
import re
import unicodedata

from rlft.data.compose import words

# In the paper's list of occupations, but more often something else in a caption.
_NO_PEOPLE = frozenset({"cook", "decorator", "director", "porter", "printer", "vet"})
# Persons all the same where a colour stands before them.
_PEOPLE_OF_A_COLOUR = frozenset(
  "cook cooks director directors guard guards king kings model models pirate pirates trainer"
  " trainers troop troops".split()
)
# Words that are persons only in some places: "two cooks in a kitchen", "a model train".
_PEOPLE_IN_PLACES = re.compile(
  r"(?<!\w)(?:(?:an?|the|two|three|four|some|several) cooks?(?= (?:and|at|i[ns]|with)(?!\w)|$)"
  r"|(?:fashion|runway|nude|glamou?r) models?"
  r"|models? (?:is |are )?(?:on (?:a|the) (?:runway|catwalk)|pos\w+|walk\w+|wear\w+)"
  r"|group (?:is )?(?:pos|sitting|standing|smil|laugh|danc|gather)\w*)(?!\w)"
)
# With a word for people in it, but without any.
_NOT_PEOPLE = re.compile(
  r"(?<!\w)(?:(?:record|cd|dvd|mp3|media|music|video) players?"
  r"|(?:ceiling|electric|desk) fans?"
  r"|(?:king|queen)[ -]sized?|(?:king|queen|two|four)[ -]person \w+|man ?hole\w*|man made"
  r"|lady ?bugs?|human[ -]sized? \w+|coffee table books?|grand baby|baby grands?"
  r"|(?:a|the) couple of|baby carrots?|king (?:crab|cobra|salmon)s?|(?:police|german) shepherds?"
  r"|(?:cake|cookie|pancake|waffle|muffin|brownie|bread) batter|batter (?:bowl|mix)\w*)(?!\w)"
)
# Before a thing or an animal, these words belong to its name: "a coach bus", "a female lion".
_IN_NAMES = (
  "adult|baby|clown|coach|driver|family|fan|female|infant|king|male|monk|newborn|patient|pirate"
  "|player|police|president|prince|princess|queen|senior|student|toddler|visitor|youth"
)
# Not so before these, which show the person: "a female portrait".
_PICTURES = frozenset(
  "art artwork drawing illustration image painting photo photograph photography picture portrait"
  " shot sketch".split()
)
# Words that end what a colour before them may describe.
_ENDS = frozenset(
  "a about above across after against all along amid among an another are around as at be before"
  " behind below beneath beside besides between but by during each every for from had has have he"
  " her his holding if in inside into is it its like my near next of off on onto or our out outside"
  " over past per she since so some than that the their them then there these they this those"
  " through to toward towards under until up upon was wears wearing were what when where which"
  " while who whose with within without you your".split()
)
_COLOURS = (
  "black|bronzed?|brown|caramel|chocolate|copper|dark|deep|ebony|fair|golden|honey|ivory|light|olive"
  "|pale|porcelain|tan|tanned|white|yellow"
)
# Skin that is of no person, or a word that says nothing of its colour.
_OTHER_SKIN = (
  "a|and|animal|any|apple|as|banana|bare|bear|beautiful|clean|clear|crocodile|delicate|detailed|dry"
  "|exposed|fish|flawless|for|from|fruit|glistening|glossy|glowing|goat|hairy|healthy|her|his|human"
  "|into|its|leopard|life|like|lion|my|natural|no|of|oily|on|or|orange|our|own|perfect|potato|real"
  "|realistic|rough|scaly|second|shark|sheep|shiny|silky|smooth|snake|soft|some|sweaty|textured|that"
  "|the|their|thick|thin|this|tiger|to|translucent|under|wet|with|wrinkled|wrinkly|your|zebra"
)
# Of these, too, the words that describe people make something ethnic; skin is as good as a person.
_OF_PEOPLE = frozenset(
  "ancestry communities community complexion culture descent hands heritage history lives origin"
  " origins roots skin".split()
)
_PRONOUNS = frozenset(("he", "she"))
# Right after a colour these take it for themselves: "a black haired woman".
_TAKES_COLOUR = frozenset("clad coated dressed eyed haired robed shirted suited".split())
# A person by trade, whose name may begin with a thing: "a black baseball player".
_AGENT = re.compile(r"(?!(?:.*(?:fa|mo|bro)ther|sister|daughter|elder)s?$)\w+(?:er|or|ist|ian)s?$")
_END = r"(?=[^\w\s-]|$)"
_INVISIBLE = re.compile(
  '[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"\u201c-\u201f\u00ab\u00bb]'
)
_TOKEN = re.compile(r"\w+")
_WORD = re.compile(r"[\w-]+")
_NEXT = re.compile(r"(?:[,;:/] ?| )(?:& )?([\w'][\w'-]*)")
_GAP = 4  # Words between a colour and the person.
_SKIN = tuple(
  re.compile(rf"(?<![\w']){pattern}(?!\w)")
  for pattern in (
    rf"(?!(?:{_OTHER_SKIN})[ -])\w+[ -](?:skin(?:ned)?(?! tones?| colou?r)"
    r"|complect\w+|complexion(?:ed)?)",
    rf"(?:{_COLOURS})(?:,? [\w-]+){{0,2}},? (?:skin(?:ned)?|complexion(?:ed)?)",
    rf"(?:skin|complexion)(?: (?:is|was|as|like|looks?|colou?r|of|so|that|the|very)){{1,4}}"
    rf" (?:{_COLOURS})",
    rf"(?:skin|complexion) (?:{_COLOURS}) as",
    r"colou?rs? of (?:\w+ )?skins?",
    r"(?:skin|complexion) (?:of )?the colou?rs? of",
  )
)


def ethnic_term(caption: str) -> str:
  """The first term of race, ethnicity or skin colour of a caption; empty if there is none."""
  text = _plain(caption)
  return min(_terms(text), default=(0, ""), key=lambda found: found[0])[1]


def has_people(caption: str) -> bool:
  """Whether a caption names a person."""
  text = _plain(caption)
  tokens = _WORD.findall(text)
  if _hints_of_people().isdisjoint(tokens):
    return False
  if "'" not in text and not _certain().isdisjoint(tokens):
    return True
  text = _in_names().sub(" ", _NOT_PEOPLE.sub(" ", text))
  if not _people().isdisjoint(_WORD.findall(text)):
    return True
  return any(pattern.search(text) for pattern in (_PEOPLE_IN_PLACES, _people_of_words()))


@functools.lru_cache(maxsize=1)  # Both questions are asked of one caption after the other.
def _plain(caption: str) -> str:
  """A caption in small letters, with plain apostrophes, hyphens, single spaces, without quotes."""
  if not caption.isascii():
    caption = unicodedata.normalize("NFKC", caption)
    caption = re.sub("[\u2018\u2019\u02bc]", "'", re.sub("[\u2010-\u2015]", "-", caption))
  text = _INVISIBLE.sub("", caption.lower()).replace("`", "'").replace("_", " ")
  if "'" in text:
    text = re.sub(r"(?<!\w)'|(?<!s)'(?!\w)", "", text)
  if "(" in text or "[" in text or "{" in text:
    # What stands in brackets is as if between commas: "a woman (Black)".
    text = re.sub(r"[)\]}]", " ", re.sub(r"[ ,]*[(\[{][(\[{ ]*", ", ", text))
  return " ".join(text.split())


def _terms(text: str) -> Iterator[tuple[int, str]]:
  """Where terms stand in a plain caption, and the terms.

  Few captions have any of the words that terms have: the patterns are for those alone.
  """
  tokens = _TOKEN.findall(text)
  if not _hints("ethnicity").isdisjoint(tokens) and (found := _always().search(text)):
    yield found.start(), found[0]
  if not _hints("describing").isdisjoint(tokens):
    yield from _described(text)
  if "skin" in text or "complex" in text or "complect" in text:
    yield from ((found.start(), found[0]) for p in _SKIN if (found := p.search(text)))


def _described(text: str) -> Iterator[tuple[int, str]]:
  """Persons that a word of describing.txt tells of, before them or after."""
  for found in _before().finditer(text):
    if end := _end_of_person(text, found):
      yield found.start(), text[found.start() : end]
  for pattern in _after():
    # One may begin within another: "a portrait of [a woman who is Black]".
    start = 0
    while found := pattern.search(text, start):
      if found[1] in _persons() or found[1] in _PRONOUNS:
        yield found.start(), found[0]
      start = found.end(1)


def _end_of_person(text: str, found: re.Match[str]) -> int:
  """Where the person ends whom the words that were found describe; 0 if they describe none."""
  start, end = found.span()
  if text.startswith("american football", start):
    return 0
  if text.startswith("-", end):
    compound = _TOKEN.match(text, end + 1)
    return compound.end() if compound and compound[0] in _persons() else 0
  # "in white" ends what is worn, but for "interest in black men".
  reach = 1 if text.endswith(" in ", 0, start) else _GAP
  for place in range(reach + 1):
    step = _NEXT.match(text, end)
    if not step:
      return 0
    end = step.end()
    word = step[1].removesuffix("'s")
    if word in _persons() or word in _OF_PEOPLE:
      return _end_of_persons(text, step.end(1) - len(step[1]) + len(word))
    following = _NEXT.match(text, end)
    after = following[1].removesuffix("'s") if following else ""
    if (
      word in _ENDS
      or (word in ("and", "or") and (after in _ENDS or after in _persons()))
      or (place == 0 and word in _TAKES_COLOUR and "," not in step[0])
      or (word in _things() and not (after in _persons() and _AGENT.match(after)))
    ):
      return 0
  return 0


def _end_of_persons(text: str, end: int) -> int:
  """The end of the words for persons that follow one at `end`: "police officer"."""
  while (step := _NEXT.match(text, end)) and text[end] == " " and step[1] in _persons():
    end = step.end()
  return end


def _any_of(terms: Iterable[str]) -> str:
  """A pattern for terms, the longest first; spaces stand for hyphens, too."""
  ordered = sorted(terms, key=len, reverse=True)
  return "|".join(re.escape(term).replace(r"\ ", "[ -]?") for term in ordered)


def _with_plurals(terms: Iterable[str]) -> frozenset[str]:
  forms = set(terms)
  for word in terms:
    is_y = re.search("[^aeiou]y$", word)
    forms |= {f"{word[:-1]}ies"} if is_y else {f"{word}s", f"{word}es"}
  return frozenset(forms)


@functools.cache
def _people() -> frozenset[str]:
  """Words and groups of words for people."""
  named = {*words("people"), *(word.lower() for word in words("occupations"))}
  return _with_plurals(named - _NO_PEOPLE)


@functools.cache
def _certain() -> frozenset[str]:
  """Words for people that are in the name of no thing, which saves a search for such names."""
  in_names = re.findall("[a-z]+", f"{_IN_NAMES} {_NOT_PEOPLE.pattern} crowd family families")
  return _people() - _with_plurals(in_names)


@functools.cache
def _persons() -> frozenset[str]:
  """Single words that are persons where a colour stands before them."""
  occupations = (word.lower().split()[-1] for word in words("occupations"))
  return _with_plurals({*_people(), *occupations} - {"decorator", "printer"}) | _PEOPLE_OF_A_COLOUR


@functools.cache
def _things() -> frozenset[str]:
  named = {*words("things"), *(re.split("[ ,]", name)[-1] for name in words("objects"))}
  return _with_plurals(named) - _persons()


@functools.cache
def _hints_of_people() -> frozenset[str]:
  """Words without which a caption has no people; groups of words are found by their last."""
  ends = {re.split("[ -]", name)[-1] for name in _people()}
  return _people() | ends | {"cook", "cooks", "model", "models", "group"}


@functools.cache
def _people_of_words() -> re.Pattern[str]:
  groups = (name for name in _people() if " " in name)
  return re.compile(rf"(?<![\w-])(?:{_any_of(groups)})(?![\w-])")


@functools.cache
def _in_names() -> re.Pattern[str]:
  """A word for people that a thing's name begins with, or that owns a thing."""
  things = _any_of(_things() - _PICTURES)
  return re.compile(
    rf"(?<![\w-])(?:(?:{_IN_NAMES})[ -]|\w+(?:'s|s') (?:\w+ )??)(?:{things})(?![\w-])"
    rf"|(?<![\w-])(?:crowd|family|families) of (?:\w+ )?(?:{things})(?![\w-])"
  )


@functools.cache
def _hints(name: str) -> frozenset[str]:
  """Words of which each term of a list has one: of several the longest, but none for people."""
  hints = set()
  for term in words(name):
    parts = re.split("[ -]", term)
    hints |= {"".join(parts), max(parts, key=lambda part: (part not in _people(), len(part)))}
  return frozenset(f"{hint}{ending}" for hint in hints for ending in ("", "s", "es"))


@functools.cache
def _always() -> re.Pattern[str]:
  return re.compile(rf"(?<!\w)(?:{_any_of(words('ethnicity'))})(?:s|es)?(?!\w)")


@functools.cache
def _before() -> re.Pattern[str]:
  """Words that describe who follows: "Black", "white and black", "a black and a white"."""
  one = _any_of(words("describing"))
  return re.compile(
    rf"(?<!\w)(?:{one})(?:(?:,? (?:(?:and|or|&) )?(?:an? )?|-)(?:{one})(?!\w))*(?!\w)"
  )


@functools.cache
def _after() -> tuple[re.Pattern[str], ...]:
  """Words that describe who comes before: "a woman, Black", "the man in the picture is white"."""
  one = _any_of(words("describing"))
  word, phrase = (
    r"(?<![\w'-])([\w-]+)",
    r"(?: (?:in|on|at|by|from|near|of|to|with) (?:\w+ )?[\w-]+)",
  )
  verb = "(?:is|are|was|were|looks?|appears?)(?: (?:both|either|all|very|an?))?"
  return (
    re.compile(rf"{word} ?[,;:/-] ?(?:[\w-]+, )?(?:{one}){_END}"),
    re.compile(rf"{word} (?:both|either) (?:{one})(?!\w)"),
    re.compile(
      rf"{word},? (?:with )?one (?:(?:is|was) )?(?:{one}),? (?:and|or|but)"
      r" (?:one|another|the other)(?!\w)"
    ),
    re.compile(
      rf"{word}(?:{phrase}{{0,2}},?(?: who)?| that) {verb} (?:{one})"
      rf"(?:{_END}|(?= (?:and|or|but|with)(?!\w)))"
    ),
  )
