"""How codecs fill the messages of a collective, and what is made of them."""
