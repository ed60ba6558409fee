"""What every step runs in.

steps       where a step begins and ends, its progress lines, what SIGTERM does
errors      a user's mistake becomes one message
outputs     folders that appear complete or not at all, with the settings they were made with
retry       what may work a little later is tried again
report      HTML pages
lines       what a step says: text for people, JSON between processes
progress    where training is, as a line
redaction   secrets taken out of all that is printed or written
build       which code ran
cpus, proxies, timeouts   limits of this process
"""

import logging

# They warn at each start of packages and devices that are not used here. This package is imported before them.
for _name in ("bitsandbytes.backends.cpu.ops", "accelerate.big_modeling"):
    logging.getLogger(_name).setLevel(logging.ERROR)
