// Values as people read them. Everything here is pure.
"use strict";

const Format = {
  // Seconds of a protobuf duration such as "1.250s".
  seconds: (text) => (text ? Number.parseFloat(text) : 0),

  time(seconds) {
    if (seconds < 1) {
      const ms = seconds * 1000;
      return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
    }
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
    const minutes = Math.floor(seconds / 60);
    if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },

  size(bytes) {
    let number = Number(bytes || 0);
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (number < 1024) return `${unit === "B" ? number : number.toFixed(1)} ${unit}`;
      number /= 1024;
    }
    return `${number.toFixed(1)} TiB`;
  },

  rate: (bytes) => `${Format.size(bytes)}/s`,

  // The last part of an identity such as spiffe://example.org/vmhost/a.
  host: (uri) => (uri || "").split("/").pop() || "?",

  // "MIGRATION_PHASE_HANDING_OFF" without its prefix, as words.
  word: (name, prefix) => (name || "").replace(prefix, "").toLowerCase().replaceAll("_", " "),

  ago(iso, now) {
    if (!iso) return "";
    const seconds = Math.max(0, (now - Date.parse(iso)) / 1000);
    if (seconds < 60) return "just now";
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
    return new Date(iso).toISOString().slice(0, 10);
  },

  phase: (migration) => Format.word(migration.phase, "MIGRATION_PHASE_"),
  outcome: (migration) => Format.word(migration.outcome, "MIGRATION_OUTCOME_"),
};
