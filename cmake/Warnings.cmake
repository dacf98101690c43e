# Warnings, per target; errors only where CI asks for them.
add_library(mf_warnings INTERFACE)
target_compile_options(mf_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-psabi -Wno-unknown-pragmas>)
if(MAGVIT_FAST_WERROR)
  target_compile_options(mf_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(MAGVIT_FAST_SANITIZE)
  list(JOIN MAGVIT_FAST_SANITIZE "," _sanitizers)
  target_compile_options(mf_warnings INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${_sanitizers} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -g1>)
  target_link_options(mf_warnings INTERFACE -fsanitize=${_sanitizers})
endif()
