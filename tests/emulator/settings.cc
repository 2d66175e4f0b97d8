#include "settings.h"

#include <errno.h>
#include <stdlib.h>

namespace fusedseq {
namespace emulator {

namespace {

bool parse(const std::string& text, unsigned long long& value) {
  char* end = nullptr;
  errno = 0;
  value = strtoull(text.c_str(), &end, 10);
  return !text.empty() && text[0] >= '0' && text[0] <= '9' && !*end && !errno;
}

}  // namespace

std::string read_settings(Settings& settings) {
  settings = Settings();
  unsigned long long value = 0;
  if (const char* seed = getenv("FUSEDSEQ_EMULATOR_SEED")) {
    if (!parse(seed, value)) return std::string("FUSEDSEQ_EMULATOR_SEED must be a number, not '") + seed + "'";
    settings.seed = value;
  }
  const char* device = getenv("FUSEDSEQ_EMULATOR_DEVICE");
  std::string rest = device ? device : "";
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string item = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    const size_t equals = item.find('=');
    const std::string key = item.substr(0, equals);
    int* target = key == "capability"      ? &settings.capability
                  : key == "sms"           ? &settings.sms
                  : key == "shared"        ? &settings.shared
                  : key == "shared_per_sm" ? &settings.shared_per_sm
                  : key == "cluster"       ? &settings.cluster
                                           : nullptr;
    if (!target || equals == std::string::npos || !parse(item.substr(equals + 1), value) || value > 1 << 30)
      return "FUSEDSEQ_EMULATOR_DEVICE must be a list like 'sms=4,shared=65536' of capability, sms, shared, "
             "shared_per_sm and cluster; its item '" +
             item + "' is not understood";
    *target = int(value);
  }
  return "";
}

}  // namespace emulator
}  // namespace fusedseq
