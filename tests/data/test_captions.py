"""Which captions a reward for even shares of skin tones may be trained on."""

import pytest

from rlft.data import captions


@pytest.mark.parametrize(
  ("caption", "term"),
  [
    # A colour is one of skin where it describes a person,
    ("a Black woman", "black woman"),
    ("A BLACK WOMAN with an umbrella", "black woman"),
    ("two black women", "black women"),
    ("a white man's hat", "white man"),
    ("a white young man", "white young man"),
    ("a young white middle-aged man", "white middle-aged man"),
    ("a white, elderly man", "white, elderly man"),
    ("black curly-haired girls", "black curly-haired girls"),
    ("a pale goth girl", "pale goth girl"),
    ("white and black teenage boys", "white and black teenage boys"),
    ("a black and a white man", "black and a white man"),
    ("brown people at a market", "brown people"),
    ("a black police officer", "black police officer"),
    ("a black-male portrait", "black-male"),
    ("the man is black.", "man is black"),
    ("a woman who is white and laughs", "woman who is white"),
    ("Black lives matter protest", "black lives"),
    ("three blacks at a bar", "blacks"),
    # or skin,
    ("a dark-skinned dancer", "dark-skinned"),
    ("a girl with fair skin", "fair skin"),
    ("a man with a pale complexion", "pale complexion"),
    ("her skin is very dark", "skin is very dark"),
    ("people with different skin tones", "skin tones"),
    ("a person of colour", "person of colour"),
    # and of nothing else.
    ("a woman in a black dress", ""),
    ("a man in black", ""),
    ("a woman in white and a man in black", ""),
    ("a bride in white and men in suits", ""),
    ("a girl before a white wall", ""),
    ("a black and white photo of a man", ""),
    ("black-and-white portrait of a woman", ""),
    ("a black-haired woman", ""),
    ("a girl with brown eyes and dark hair", ""),
    ("a white-bearded man with a black dog", ""),
    ("the man is white water rafting", ""),
    ("the man's shirt is black", ""),
    ("a man in skinny white jeans", ""),
    ("a man with an olive in a martini", ""),
    ("a man with a brown bear", ""),
    ("a Blackhawk helicopter and its pilot", ""),
    # A people goes wherever it is named: the word alone steers who is drawn.
    ("Asian food on a table with two women", "asian"),
    ("an African elephant and a boy", "african"),
    ("an African-American man", "african"),
    ("Asians in a park", "asians"),
    ("a girl of Asian descent", "asian"),
    ("Chinese lanterns and a child", "chinese"),
    ("an Indian bride", "indian"),
    ("a Latina singer", "latina"),
    ("Native American dancers", "native american"),
    ("a mixed-race couple", "mixed-race"),
    ("a multi-ethnic group of people", "multi-ethnic"),
    ("ethnically diverse students", "ethnically"),
    ("an \uff21\uff53\uff49\uff41\uff4e man", "asian"),  # Letters of full width.
    ("a woman\u2013Latina\u2013smiling", "latina"),
    # Nationalities that mostly name other things go where they describe a person.
    ("a French woman", "french woman"),
    ("an Irish-American boy", "irish-american boy"),
    ("a man of Russian descent", "russian descent"),
    ("women who are Italian.", "women who are italian"),
    ("a man eats French fries", ""),
    ("an American football player", ""),
    ("a woman with a Persian cat", ""),
    ("a man in a Polish street", ""),
    ("a girl gets her nails done with polish", ""),
    # Places say nothing of people; a race is also run, a skin is also of fruit.
    ("a man in Africa", ""),
    ("a woman from China", ""),
    ("a man in Indiana", ""),
    ("a man in a race car", ""),
    ("women run a race", ""),
    ("a child peels the skin of an orange", ""),
    ("a woman with dreadlocks", ""),
    # Rather one too many.
    ("the dark knight", "dark knight"),
    ("a man with a black male cat", "black male"),
    ("a chef in a white chef's hat", "white chef"),
    ("photo, black and white, old man", "black and white, old man"),
  ],
)
def test_terms_of_race_ethnicity_and_skin_colour(caption, term):
  assert captions.ethnic_term(caption) == term


@pytest.mark.parametrize(
  ("caption", "people"),
  [
    ("a man riding a wave", True),
    ("Three MEN on a bench", True),
    ("babies in a row", True),
    ("two guys", True),
    ("boys and ladies", True),
    ("a lady's hat on a girl", True),
    ("a chief executive officer at work", True),
    ("a skier jumps", True),
    ("policewomen on horses", True),
    ("a baby with a baby elephant", True),
    ("a plate of food", False),
    ("a man-made lake", False),
    ("a snowman and a mannequin", False),
    ("a record player on a shelf", False),
    ("a baby elephant", False),
    ("a printer on a desk", False),
    ("food to cook on a stove", False),
    ("a manhole cover", False),
    ("a two-person tent", False),
    ("a romantic mango", False),
  ],
)
def test_captions_of_people(caption, people):
  assert captions.has_people(caption) == people
